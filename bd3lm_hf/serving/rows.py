"""One request's `generate`, which waits wherever it calls the network: all that the engine knows of its inside."""

import inspect
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..kernels.cpu_nucleus import with_selecting_nucleus
from ..modeling.generation_block_diffusion import BlockDiffusionGenerationMixin
from .joint import Step, WaitingModel
from .requests import Draft, Request, Written
from .slots import Call, SlotCache


class Row:
    """
    The text of one request under `generate`, which rests wherever it needs a forward: `call` is that, or the denoising
    step that needs it, and [`resume`] goes on once it is done. In the end `call` is None, and `output` what `generate`
    returned.

    Args:
        model: a block diffusion language model.
        request: what to write.
        cache: the slot that it is written in.

    Raises:
        ValueError: `generate` refuses what it is asked for.
    """

    def __init__(self, model: Any, request: Request, cache: SlotCache):
        self.model, self.request, self.cache = model, request, cache
        self.call: Call | Step | None = None
        self.output: Any = None
        self._greenlet = greenlet(self._write)
        self.resume()

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that are not read yet."""
        return len(self.request.input_ids) - self.cache.num_filled

    def resume(self, output: Any = None) -> None:
        """Goes on to the next rest, or to the end, with the `output` of a call; raises what `generate` raises."""
        result = self._greenlet.switch() if output is None else self._greenlet.switch(output)
        if self._greenlet.dead:
            self.call, self.output = None, result
        else:
            self.call = result

    def cancel(self) -> None:
        """Ends it where it is."""
        self._greenlet.throw()
        self.call = None

    def _write(self) -> Any:
        request, device = self.request, self.model.device
        # A text whose gaps are filled does not go on after them.
        length = {"max_new_tokens": request.max_new_tokens} if request.max_new_tokens else {}
        return self.model.generate(
            torch.tensor([request.input_ids], device=device),
            attention_mask=torch.ones(1, len(request.input_ids), dtype=torch.long, device=device),
            cache=self.cache,
            custom_generate=denoise_waiting,
            streamer=RowStreamer(request),
            return_dict_in_generate=True,
            output_reveal=request.wants_reveal or request.wants_drafts,
            **length,
            **request.options,
        )


def denoise_waiting(model: Any, input_ids: Tensor, logits_processor: Any, **arguments: Any) -> Any:
    """The denoising loop of `generate`, waiting at each forward; `input_ids` [1, length]."""
    # Packed weights, which the kernels make for each `generate`, the engine has for all.
    denoise = inspect.unwrap(BlockDiffusionGenerationMixin._sample)
    if input_ids.device.type == "cpu":
        logits_processor = with_selecting_nucleus(logits_processor)
    return denoise(WaitingModel(model), input_ids, logits_processor, **arguments)


class RowStreamer(BaseStreamer):
    """Tells a request's listener what is written, block by block, and of drafts if it asked for them."""

    def __init__(self, request: Request):
        self.request, self.num_told = request, 0
        self._probabilities: Tensor | None = None

    def put(self, value: Tensor) -> None:
        """The prompt first [1, length], which is told to nobody, then ids of finished blocks [length]."""
        is_prompt, ids = self.num_told == 0, value.flatten().tolist()
        start, self.num_told = self.num_told, self.num_told + len(ids)
        if not is_prompt and ids:
            self.request.tell(Written(ids, self._log_probabilities(start, self.num_told)))

    def put_reveal(self, tokens: Tensor, reveal_steps: Tensor, token_probabilities: Tensor) -> None:
        """The text after a step, which forward revealed each token, and how probable it was, each [1, length]."""
        self._probabilities = token_probabilities[0]
        if self.request.wants_drafts:
            self.request.tell(Draft(tokens[0, self.num_told :].tolist()))

    def end(self) -> None:
        """The end is told by the engine, which knows how it came."""

    def _log_probabilities(self, start: int, end: int) -> list[float] | None:
        if self._probabilities is None or not self.request.wants_reveal:
            return None
        return self._probabilities[start:end].log().tolist()
