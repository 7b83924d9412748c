"""`generate` as a film: it runs in a thread of its own, and each step comes out as a frame."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Frame:
    """
    A text after a step.

    Attributes:
        tokens: ids, the mask token where none is revealed yet [length].
        is_given: which tokens were there from the start, bool [length].
        reveal_steps: which forward revealed each token, from 1; 0 for given tokens [length].
        probabilities: the model's probability of each token when it was revealed; NaN for given tokens [length].
        num_forwards: forwards so far.
        seconds: since `generate` was called.
        is_last: whether `generate` has returned.
    """

    tokens: torch.Tensor
    is_given: torch.Tensor
    reveal_steps: torch.Tensor
    probabilities: torch.Tensor
    num_forwards: int
    seconds: float
    is_last: bool


# Frames that `generate` may be ahead of those that are taken; then it waits.
MOST_FRAMES_AHEAD = 256


class Unwatched(Exception):
    """Ends a `generate` whose frames nobody takes any more."""


class FrameStreamer(BaseStreamer):
    """Puts what `generate` shows it into a queue of frames."""

    def __init__(self, prompt: torch.Tensor, mask_token_id: int):
        self.frames: queue.Queue[Frame | BaseException] = queue.Queue(MOST_FRAMES_AHEAD)
        self.is_watched = True
        self._prompt_is_given = prompt != mask_token_id
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Finished blocks were seen in the frames."""

    def end(self) -> None:
        """The last frame is made of what `generate` returns."""

    def put_reveal(self, tokens: torch.Tensor, reveal_steps: torch.Tensor, probabilities: torch.Tensor) -> None:
        """A frame of the first row of what is shown [batch, length]; on a CPU that changes from step to step."""
        if not self.is_watched:
            raise Unwatched
        parts = [part[0].clone() for part in (tokens, reveal_steps, probabilities)]
        self._put(*parts, num_forwards=int(parts[1].max()), is_last=False)

    def finish(self, output: Any) -> None:
        """The last frame, of the output of `generate`."""
        parts = [part[0].cpu() for part in (output.sequences, output.reveal_steps, output.token_probabilities)]
        self._put(*parts, num_forwards=int(output.num_forward_passes[0]), is_last=True)

    def _put(self, tokens: torch.Tensor, *parts: torch.Tensor, num_forwards: int, is_last: bool) -> None:
        is_given = torch.zeros_like(tokens, dtype=torch.bool)
        is_given[: len(self._prompt_is_given)] = self._prompt_is_given
        now = time.perf_counter()
        self.frames.put(Frame(tokens, is_given, *parts, num_forwards, now - self._start, is_last))
        # What it waits is no part of the seconds that it takes.
        self._start += time.perf_counter() - now

    def close(self) -> None:
        """Lets a `generate` that waits go on, and end at its next step."""
        self.is_watched = False
        while not self.frames.empty():
            self.frames.get_nowait()


def watch(model: Any, input_ids: torch.Tensor, **options: Any) -> Iterator[Frame]:
    """
    The frames of `model.generate(input_ids, **options)`, the last one made of what it returns.

    `generate` is at most `MOST_FRAMES_AHEAD` ahead of whoever looks at them. A generator that is closed ends it at its
    next step.

    Args:
        input_ids: a single prompt [1, length].
        options: arguments of `generate`.

    Raises:
        ValueError: `generate` refuses its arguments.
    """
    streamer = FrameStreamer(input_ids[0].cpu(), model.config.mask_token_id)

    def work() -> None:
        try:
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                return_dict_in_generate=True,
                output_reveal=True,
                **options,
            )
            streamer.finish(output)
        except BaseException as error:
            streamer.frames.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            frame = streamer.frames.get()
            if isinstance(frame, BaseException):
                raise frame
            yield frame
            if frame.is_last:
                return
    finally:
        streamer.close()
        thread.join()
