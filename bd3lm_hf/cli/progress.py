"""How far `generate` is: a bar of the tokens that were read and written."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer


# What takes less than so many seconds shows nothing.
DELAY = 2.0


class GenerationProgress(tqdm):
    """
    A bar of tokens, those of prompts and the new ones, over all batches; it stays hidden for the first two seconds.

    Args:
        model: What generates.
        num_rows: Texts to be written in all; they are taken to be as long as those of the batch at hand.
    """

    def __init__(self, model: Any, num_rows: int):
        super().__init__(total=0, desc="Generating", unit=" tokens", unit_scale=True, delay=DELAY)
        self.model, self.num_rows = model, num_rows

    @contextlib.contextmanager
    def of_batch(self, prompts: torch.Size, num_rows: int, options: dict[str, Any]) -> Iterator[BaseStreamer]:
        """Within it `generate` is called, with what is yielded as its streamer, for prompts of a shape."""
        prompt_width = prompts[1]
        width = prompt_width + (options.get("max_new_tokens") or 0)
        self.total, done = self.n + self.num_rows * width, self.n
        counter = _TokenCounter(self, num_rows, prompt_width, self.model.config.block_size)
        handle = self.model.register_forward_pre_hook(counter.note_forward, with_kwargs=True)
        try:
            yield counter
        finally:
            handle.remove()
        # Rows may have ended early.
        self.num_rows -= num_rows
        self.update(done + num_rows * width - self.n)


class _TokenCounter(BaseStreamer):
    """Moves a bar as `generate` reads the prompts of a batch, and as it hands over finished tokens."""

    def __init__(self, bar: tqdm, num_rows: int, prompt_width: int, block_size: int):
        self.bar, self.num_rows, self.prompt_width, self.block_size = bar, num_rows, prompt_width, block_size
        self.is_first, self.num_read = True, 0

    def note_forward(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward: it reads what stands before the block that is denoised."""
        self._read(self.num_read + kwargs["input_ids"].shape[1] - self.block_size)

    def put(self, value: torch.Tensor) -> None:
        """First the prompts, which are to be read yet; then new tokens, after all prompts have been read."""
        if self.is_first:
            self.is_first = False
            return
        self._read(self.prompt_width)
        self.bar.update(value.numel())

    def end(self) -> None:
        """The batch says itself when it is complete."""

    def _read(self, num_columns: int) -> None:
        num_columns = min(max(num_columns, self.num_read), self.prompt_width)
        self.bar.update(self.num_rows * (num_columns - self.num_read))
        self.num_read = num_columns
