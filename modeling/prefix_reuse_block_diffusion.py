"""Which tokens a cache holds: given to `generate` again, it spares computing the blocks that a prompt begins with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from .cache_block_diffusion import WindowLayer


@dataclass
class CleanText:
    """
    The finished blocks of each row as the network reads them: one column for each position of the cache, then those
    that the cache does not hold yet. Columns are common to all rows, so a shorter row has empty ones before its own.

    Attributes:
        ids: [batch, columns].
        positions: each token's position in its row [batch, columns], -1 where the row has nothing.
        length: position at which each row's next block begins [batch].
        num_cached: columns that the cache holds.
    """

    ids: Tensor
    positions: Tensor
    length: Tensor
    num_cached: int = 0

    def __post_init__(self):
        columns = torch.arange(self.num_columns, device=self.ids.device)
        # Plain rows need neither mask nor positions.
        self.is_plain = bool((self.positions == columns).all() and (self.length == self.num_columns).all())

    @classmethod
    def of_prompts(cls, prefix: Tensor, length: Tensor) -> "CleanText":
        """From each position's id, -1 where there is none [batch, width], and each row's positions in whole blocks."""
        empty = prefix.new_zeros(prefix.shape[0], 0)
        return cls(empty, empty, torch.zeros_like(length)).followed_by(prefix, length)

    def shared_with(self, prefix: Tensor, length: Tensor, block_size: int) -> "CleanText":
        """What is cached of this text and the first blocks of new prompts; arguments as for `of_prompts`."""
        num_rows, width = prefix.shape
        ids, positions = self.ids[:, : self.num_cached], self.positions[:, : self.num_cached]
        # The cached id at each position; what comes after the prompts goes to a column of its own.
        column = torch.where((positions >= 0) & (positions < width), positions, width)
        cached = prefix.new_full((num_rows, width + 1), -1).scatter(1, column, ids)
        within = torch.arange(width, device=prefix.device) < length[:, None]
        num_alike = ((cached[:, :width] == prefix) & within).long().cumprod(-1).sum(-1) // block_size * block_size
        is_used = (positions >= 0) & (positions < num_alike[:, None])
        return CleanText(ids, positions.masked_fill(~is_used, -1), num_alike, self.num_cached)

    def followed_by(self, prefix: Tensor, length: Tensor) -> "CleanText":
        """With the rest of each row's prefix in common new columns, of which all rows use the last."""
        width = int((length - self.length).max())
        positions = torch.arange(width, device=prefix.device) + (length[:, None] - width)
        ids = prefix.gather(1, positions.clamp(min=0))
        is_empty = (positions < self.length[:, None]) | (ids < 0)
        ids = torch.cat([self.ids, ids.masked_fill(is_empty, 0)], dim=1)
        positions = torch.cat([self.positions, positions.masked_fill(is_empty, -1)], dim=1)
        return CleanText(ids, positions, length, self.num_cached)

    @property
    def num_columns(self) -> int:
        return self.ids.shape[1]

    @property
    def pending(self) -> Tensor:
        """What the cache does not hold yet [batch, columns]."""
        return self.ids[:, self.num_cached :]

    def block_positions(self, is_real: Tensor | None, block_size: int) -> Tensor:
        """Positions of each row's next block [batch, block_size], -1 where `is_real` says so."""
        positions = self.length[:, None] + torch.arange(block_size, device=self.length.device)
        return positions if is_real is None else positions.masked_fill(~is_real, -1)

    def append(self, block: Tensor, is_real: Tensor | None = None) -> None:
        """Adds a finished block [batch, block_size] to each row."""
        self.positions = torch.cat([self.positions, self.block_positions(is_real, block.shape[1])], dim=1)
        self.ids = torch.cat([self.ids, block], dim=1)
        self.length = self.length + block.shape[1]
        self.is_plain = self.is_plain and is_real is None

    def most_columns_seen(self, window: int, block_size: int, num_stages: int) -> int:
        """How many columns before it any block sees: of those not cached yet, and of the next `num_stages`."""
        columns = torch.arange(self.num_columns, device=self.ids.device)
        # The last block to see a column; a text shorter than the window goes on seeing its beginning.
        stage = ((self.positions + window - self.length[:, None]) // block_size).clamp(max=num_stages)
        num_columns = torch.where(self.positions >= 0, self.num_columns + stage * block_size - columns, 0)
        return int(num_columns.max()) if num_columns.numel() else 0


class TextCache(DynamicCache):
    """A dynamic cache whose clean text follows its rows and positions where Transformers' methods rearrange them."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rearrange_text(lambda part: part[beam_idx])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rearrange_text(lambda part: part[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rearrange_text(lambda part: part.repeat_interleave(repeats, dim=0))

    def _rearrange_text(self, rows_of: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length():
            text = self.clean_text
            parts = map(rows_of, (text.ids, text.positions, text.length))
            self.clean_text = CleanText(*parts, text.num_cached)


def sliding_cache(num_layers: int, window: int) -> TextCache:
    """A cache that grows up to the last `window` tokens, all that a block can see, and then keeps its size."""
    cache = TextCache()
    cache.layers = [WindowLayer(window) for _ in range(num_layers)]
    return cache


def match_cache(
    cache: Cache, prefix: Tensor, length: Tensor, block_size: int, window: int, num_stages: int, reread: bool = False
) -> CleanText:
    """
    The text of prompts ([`CleanText.of_prompts`]) in the columns of a cache, which is made to hold what the next
    `num_stages` blocks see, of which each sees `window` positions before it. With `reread` the last block of each row
    is to be read again.

    The cache is empty, one that `generate` returned, or one of the first blocks of equally long prompts. Raises a
    ValueError if it belongs to another batch size, holds part of a block, has no room, or dropped what is still seen.
    """
    cached = text_in_cache(cache, prefix, length, block_size)
    if cached is None:
        text = CleanText.of_prompts(prefix, length)
    else:
        shared = cached.shared_with(prefix, length - block_size if reread else length, block_size)
        text = shared.followed_by(prefix, length)
        _, first_held = cache.get_mask_sizes(1, 0)
        is_visible = (shared.positions >= 0) & (shared.positions >= shared.length[:, None] - window)
        if is_visible[:, :first_held].any():
            reason = "since a row of the batch went on far beyond the text of another"
            advice = "generate without it, or with a `DynamicCache()` from the start"
            raise ValueError(f"`cache` has dropped positions that the next block still sees, {reason}; {advice}.")
        # While rows go on, one may be complete a block before another.
        num_seen = text.most_columns_seen(window, block_size, num_stages) + (block_size if len(prefix) > 1 else 0)
        for layer in cache.layers:
            if isinstance(layer, WindowLayer):
                layer.sliding_window = max(layer.sliding_window, num_seen + 1)
    num_columns = text.num_columns + num_stages * block_size
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and layer.max_cache_len < num_columns:
            room = f"room for {num_columns} positions, whole blocks of prompt and new tokens"
            raise ValueError(f"`cache` must have {room}, but got a static cache of {layer.max_cache_len}.")
    return text


def text_in_cache(cache: Cache, prefix: Tensor, length: Tensor, block_size: int) -> CleanText | None:
    """What a cache holds, None if it is empty; arguments and errors as of [`match_cache`]."""
    num_cached, num_rows = int(cache.get_seq_length()), len(prefix)
    if not num_cached:
        return None
    text = getattr(cache, "clean_text", None)
    sizes = [len(layer.keys) for layer in cache.layers if layer.is_initialized]
    for size in sizes if text is None else [*sizes, len(text.ids)]:
        if size != num_rows:
            raise ValueError(f"`cache` must be of the batch size of the rows to generate, {num_rows}, but got {size}.")
    if text is not None:
        if num_cached > text.num_cached:
            rule = f"what it held then, {text.num_cached} positions, or less"
            got = f"{num_cached}: nobody knows which tokens the others are"
            raise ValueError(f"`cache` that `generate` returned must hold {rule}, but got {got}.")
        # It may have been cropped since.
        return replace(text, num_cached=num_cached)
    # Filled by the user: the cached tokens can only be the prompts' first.
    if num_cached % block_size or num_cached > int(length.min()) or bool((length != length[0]).any()):
        rule = "whole blocks of the prompts in `input_ids`, whose rows must be equally long"
        got = f"{num_cached} positions for {length.tolist()} tokens in whole blocks, with `block_size` {block_size}"
        raise ValueError(f"`cache` that no `generate` returned must hold {rule}, but got {got}.")
    positions = torch.arange(num_cached, device=prefix.device).expand(num_rows, -1)
    return CleanText(prefix[:, :num_cached], positions, length, num_cached)
