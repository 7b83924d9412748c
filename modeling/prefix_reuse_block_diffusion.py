"""
Which tokens the columns of a cache hold, and which blocks of new prompts are among them.

A cache that `generate` returns can be given to it again: the blocks that a new prompt begins with are not computed
again, in each row as many as agree token for token.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from .cache_block_diffusion import WindowLayer


class CleanText:
    """
    The finished blocks of each row as the network reads them: one column for each position of the cache, then those
    that the cache does not hold yet.

    Rows of a batch have their blocks in common columns, so a shorter row has empty columns before its own. A cache
    that `generate` returns keeps its text, so that the next call finds which blocks of its prompts are cached: as many
    as agree token for token, in each row. Columns after them are empty for that row from then on.

    Attributes:
        ids: [batch, columns].
        positions: each token's position in its row [batch, columns], -1 where the row has nothing.
        length: position at which each row's next block begins [batch].
        num_cached: columns that the cache holds.
    """

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, length: torch.Tensor, num_cached: int = 0):
        self.ids = ids
        self.positions = positions
        self.length = length
        self.num_cached = num_cached
        columns = torch.arange(ids.shape[1], device=ids.device)
        # Plain rows need neither mask nor positions.
        self.is_plain = bool((positions == columns).all() and (length == ids.shape[1]).all())

    @classmethod
    def of_prompts(cls, prefix: torch.Tensor, length: torch.Tensor) -> "CleanText":
        """
        Args:
            prefix: the id at each position of the row, -1 where it has no token [batch, at least length].
            length: positions in the whole blocks of each row [batch].
        """
        empty = prefix.new_zeros(prefix.shape[0], 0)
        return cls(empty, empty, torch.zeros_like(length)).followed_by(prefix, length)

    def shared_with(self, prefix: torch.Tensor, length: torch.Tensor, block_size: int) -> "CleanText":
        """What is cached of this text and the first blocks of new prompts; arguments as for `of_prompts`."""
        num_rows, width = prefix.shape
        ids, positions = self.ids[:, : self.num_cached], self.positions[:, : self.num_cached]
        # The cached id at each position; what comes after the prompts goes to a column of its own.
        cached = prefix.new_full((num_rows, width + 1), -1)
        cached.scatter_(1, torch.where((positions >= 0) & (positions < width), positions, width), ids)
        within = torch.arange(width, device=prefix.device) < length[:, None]
        num_alike = ((cached[:, :width] == prefix) & within).long().cumprod(-1).sum(-1) // block_size * block_size
        is_used = (positions >= 0) & (positions < num_alike[:, None])
        return CleanText(ids, positions.masked_fill(~is_used, -1), num_alike, self.num_cached)

    def followed_by(self, prefix: torch.Tensor, length: torch.Tensor) -> "CleanText":
        """With the rest of each row's prefix in common new columns, of which all rows use the last."""
        width = int((length - self.length).max())
        positions = torch.arange(width, device=prefix.device) + (length[:, None] - width)
        ids = prefix.gather(1, positions.clamp(min=0))
        is_real = (positions >= self.length[:, None]) & (ids >= 0)
        return CleanText(
            torch.cat([self.ids, ids.masked_fill(~is_real, 0)], dim=1),
            torch.cat([self.positions, positions.masked_fill(~is_real, -1)], dim=1),
            length,
            self.num_cached,
        )

    @property
    def num_columns(self) -> int:
        return self.ids.shape[1]

    @property
    def pending(self) -> torch.Tensor:
        """What the cache does not hold yet [batch, columns]."""
        return self.ids[:, self.num_cached :]

    def block_positions(self, is_real: torch.Tensor | None, block_size: int) -> torch.Tensor:
        """Positions of each row's next block [batch, block_size], -1 where `is_real` says so."""
        positions = self.length[:, None] + torch.arange(block_size, device=self.length.device)
        return positions if is_real is None else positions.masked_fill(~is_real, -1)

    def append(self, block: torch.Tensor, is_real: torch.Tensor | None = None) -> None:
        """Adds a finished block [batch, block_size] to each row."""
        self.positions = torch.cat([self.positions, self.block_positions(is_real, block.shape[1])], dim=1)
        self.ids = torch.cat([self.ids, block], dim=1)
        self.length = self.length + block.shape[1]
        self.is_plain = self.is_plain and is_real is None

    def first_visible_column(self, window: int) -> int:
        """The first column that the next block of any row sees, with `window` positions before it visible."""
        is_visible = (self.positions >= 0) & (self.positions >= self.length[:, None] - window)
        columns = torch.arange(self.num_columns, device=self.ids.device)
        return int(torch.where(is_visible, columns, self.num_columns).min()) if self.num_columns else 0

    def most_columns_seen(self, window: int, block_size: int, num_stages: int) -> int:
        """How many of the last columns any of the next blocks sees, the blocks appended until then included."""
        columns = torch.arange(self.num_columns, device=self.ids.device)
        # The last of the next blocks to see a column; a text shorter than the window goes on seeing its beginning.
        stage = ((self.positions + window - self.length[:, None]) // block_size).clamp(max=num_stages)
        is_seen = (self.positions >= 0) & (stage >= 0)
        num_columns = torch.where(is_seen, self.num_columns + stage * block_size - columns, 0)
        return int(num_columns.max()) if num_columns.numel() else 0


class TextCache(DynamicCache):
    """A dynamic cache whose clean text follows its rows and positions where Transformers' methods rearrange them."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._keep_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._keep_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.get_seq_length():
            rows = torch.arange(self.clean_text.ids.shape[0], device=self.clean_text.ids.device)
            self._keep_rows(rows.repeat_interleave(repeats))

    def _keep_rows(self, rows: torch.Tensor) -> None:
        if self.get_seq_length():
            text = self.clean_text
            self.clean_text = CleanText(text.ids[rows], text.positions[rows], text.length[rows], text.num_cached)


def sliding_cache(num_layers: int, window: int) -> TextCache:
    """A cache that grows up to the last `window` tokens, all that a block can see, and then keeps its size."""
    cache = TextCache()
    cache.layers = [WindowLayer(window) for _ in range(num_layers)]
    return cache


def match_cache(
    cache: Cache, prefix: torch.Tensor, length: torch.Tensor, block_size: int, window: int, num_stages: int
) -> CleanText:
    """
    The text of the prompts in the columns of a cache, which is made to hold what their next blocks see.

    Args:
        cache: empty, one that `generate` returned, or one that holds the first blocks of equally long prompts.
        prefix, length: see [`CleanText.of_prompts`].
        window: positions before a block that it sees.
        num_stages: blocks to be denoised.

    Raises:
        ValueError: the cache belongs to another batch size, holds part of a block, has no room, or has dropped what is
            still seen.
    """
    num_cached, num_rows = int(cache.get_seq_length()), prefix.shape[0]
    cached = getattr(cache, "clean_text", None) if num_cached else None
    sizes = [layer.keys.shape[0] for layer in cache.layers if num_cached and layer.is_initialized]
    if cached is not None:
        sizes.append(cached.ids.shape[0])
    for size in sizes:
        if size != num_rows:
            raise ValueError(f"`cache` must be of the batch size of the rows to generate, {num_rows}, but got {size}.")
    if not num_cached:
        text = CleanText.of_prompts(prefix, length)
    else:
        if cached is not None and num_cached > cached.num_cached:
            raise ValueError(
                f"`cache` that `generate` returned must hold what it held then, {cached.num_cached} "
                f"positions, or less, but got {num_cached}: nobody knows which tokens the others are."
            )
        if cached is not None:
            # It may have been cropped since.
            cached = CleanText(cached.ids, cached.positions, cached.length, num_cached)
        else:
            # Filled by the user: the cached tokens can only be the prompts' first.
            if num_cached % block_size or num_cached > int(length.min()) or bool((length != length[0]).any()):
                raise ValueError(
                    "`cache` that no `generate` returned must hold whole blocks of the prompts in "
                    "`input_ids`, whose rows must be equally long, but got "
                    f"{num_cached} positions for {length.tolist()} tokens in whole blocks, with `block_size` "
                    f"{block_size}."
                )
            positions = torch.arange(num_cached, device=prefix.device).expand(num_rows, -1)
            cached = CleanText(prefix[:, :num_cached], positions, length, num_cached)
        shared = cached.shared_with(prefix, length, block_size)
        text = shared.followed_by(prefix, length)
        _, first_held = cache.get_mask_sizes(1, 0)
        if shared.first_visible_column(window) < first_held:
            raise ValueError(
                "`cache` has dropped positions that the next block still sees, since a row of the batch "
                "went on far beyond the text of another; generate without it, or with a `DynamicCache()` from the "
                "start."
            )
        # While rows go on, one may be complete a block before another.
        num_seen = text.most_columns_seen(window, block_size, num_stages) + (block_size if num_rows > 1 else 0)
        for layer in cache.layers:
            if isinstance(layer, WindowLayer):
                layer.widen(num_seen)
    num_columns = text.num_columns + num_stages * block_size
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and layer.max_cache_len < num_columns:
            raise ValueError(
                f"`cache` must have room for {num_columns} positions, whole blocks of prompt and new "
                f"tokens, but got a static cache of {layer.max_cache_len}."
            )
    return text
