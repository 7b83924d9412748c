"""
Attention on a CPU that reads only what a mask lets it see.

A block diffusion mask leaves out half of all pairs and more. Its queries are walked in chunks, and each chunk reads
the runs of keys that any query of it sees. What the mask stands for does not matter: the runs are read off the mask
itself, once for all layers.
"""

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary


# Queries of one chunk: large enough for full-speed matrix products, small against the length.
CHUNK_SIZE = 192
# Runs of keys that lie closer together are read as one.
MIN_GAP = 64
# Of all pairs of queries and keys: with more of them in the chunks, one call for all takes no longer.
MAX_SHARE = 0.9


@dataclass
class Tile:
    """Keys [start, end) of a chunk, and what is added to their scores [batch or 1, 1, queries, keys]; None is zero."""

    start: int
    end: int
    mask: torch.Tensor | None


@dataclass
class Chunk:
    """Queries [start, end), and the tiles of keys that they see."""

    start: int
    end: int
    tiles: list[Tile]


@dataclass
class MaskNotes:
    """
    What is known of a mask, for as long as that lives.

    Attributes:
        chunks: for each precision the chunks to walk, or None where one call for all pairs is better.
        is_full: whether every query sees every key; None if nobody asked yet.
        wanted: the tokens whose states after the last layer are read, bool [batch, length]; None means all.
        last_layer: what the last layer computes for those; see [`wanted_queries`].
    """

    chunks: dict[torch.dtype, list[Chunk] | None]
    is_full: bool | None = None
    wanted: torch.Tensor | None = None
    last_layer: "WantedQueries | None" = None


@dataclass
class WantedQueries:
    """
    The queries of a layer of which only some tokens are wanted.

    Attributes:
        columns: of the wanted tokens of each row, filled up with others [batch, picked].
        is_wanted: which of these are wanted, bool [batch, picked].
        mask: theirs, bool [batch, 1, picked, keys].
    """

    columns: torch.Tensor
    is_wanted: torch.Tensor
    mask: torch.Tensor


_NOTES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def notes_of(mask: torch.Tensor) -> MaskNotes:
    """What is noted of a mask; of one that is changed in place nothing is kept."""
    key = mask._version if not mask.is_inference() else 0
    version, notes = _NOTES.get(mask, (None, None))
    if notes is None or version != key:
        notes = MaskNotes({})
        _NOTES[mask] = (key, notes)
    return notes


def is_full(mask: torch.Tensor) -> bool:
    """Whether every query sees every key."""
    notes = notes_of(mask)
    if notes.is_full is None:
        notes.is_full = bool(mask.all())
    return notes.is_full


def chunks_of(mask: torch.Tensor, dtype: torch.dtype) -> list[Chunk] | None:
    """
    The chunks of a mask, bool [batch or 1, 1, queries, keys], for queries of a precision; None where the mask is
    dense, or has a query that sees nothing.
    """
    notes = notes_of(mask)
    if dtype not in notes.chunks:
        notes.chunks[dtype] = make_chunks(mask, dtype)
    return notes.chunks[dtype]


@torch.no_grad()
def make_chunks(mask: torch.Tensor, dtype: torch.dtype) -> list[Chunk] | None:
    """See [`chunks_of`]."""
    num_queries, num_keys = mask.shape[-2:]
    if num_queries <= CHUNK_SIZE or not mask.any(-1).all():
        return None
    starts = range(0, num_queries, CHUNK_SIZE)
    seen = torch.stack([mask[:, 0, start : start + CHUNK_SIZE].flatten(0, 1).any(0) for start in starts])
    runs = [runs_of(row) for row in seen]
    num_pairs = sum(CHUNK_SIZE * (end - start) for chunk_runs in runs for start, end in chunk_runs)
    if num_pairs > MAX_SHARE * num_queries * num_keys:
        return None
    chunks = []
    for start, chunk_runs in zip(starts, runs, strict=True):
        end = min(start + CHUNK_SIZE, num_queries)
        tiles = [Tile(*run, additive_mask(mask[:, :, start:end, slice(*run)], dtype)) for run in chunk_runs]
        chunks.append(Chunk(start, end, tiles))
    return chunks


def runs_of(seen: torch.Tensor) -> list[tuple[int, int]]:
    """The runs of True in bool [keys] as (start, end); those less than `MIN_GAP` apart are one."""
    edges = torch.nn.functional.pad(seen.byte(), (1, 1)).diff().nonzero()[:, 0].tolist()
    runs: list[tuple[int, int]] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if runs and start - runs[-1][1] < MIN_GAP:
            start = runs.pop()[0]
        runs.append((start, end))
    return runs


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores; finite, so that a query which sees nothing of a tile gets no NaN."""
    if visible.all():
        return None
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def wanted_queries(mask: torch.Tensor) -> WantedQueries | None:
    """The queries of the last layer, where not all are wanted; computed once for a mask."""
    notes = notes_of(mask)
    if notes.wanted is None:
        return None
    if notes.last_layer is None:
        counts = notes.wanted.sum(-1, keepdim=True)
        num_picked = max(int(counts.max()), 1)
        columns = notes.wanted.int().argsort(dim=-1, descending=True, stable=True)[:, :num_picked]
        is_wanted = torch.arange(num_picked) < counts
        # Filled up with the row's last wanted one, so that the queries of a chunk stay close together.
        columns = torch.where(is_wanted, columns, columns.gather(1, (counts - 1).clamp(min=0)))
        rows = mask[:, 0].expand(len(columns), -1, -1)
        picked = rows.gather(1, columns[..., None].expand(-1, -1, mask.shape[-1]))[:, None]
        notes.last_layer = WantedQueries(columns, is_wanted, picked)
    return notes.last_layer


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """
    Softmax attention, each of [batch, heads, length, head_dim], to [batch, queries, hidden].

    Args:
        mask: who sees whom, bool [batch or 1, 1, queries, keys]; None is everybody.
    """
    chunks = None
    if mask is not None:
        mask = None if is_full(mask) else mask
    if mask is not None:
        chunks = chunks_of(mask, query.dtype)
    if chunks is None:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        output = TiledAttention.apply(query, key, value, chunks, scaling)
    return output.transpose(1, 2).flatten(2)


def like(states: torch.Tensor, make=torch.empty_like) -> torch.Tensor:
    """A tensor [batch, heads, length, head_dim] with tokens before heads in memory, as a projection reads it."""
    return make(states.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class TiledAttention(torch.autograd.Function):
    """
    Softmax attention over the tiles of each chunk, with the CPU kernel that torch's SDPA calls as well.

    The kernel returns the log-normalizer of its tile, so that a query's tiles are merged exactly and no keys are
    copied (arXiv 2205.14135, Sec. 3.1). Given the merged output and normalizer, its backward pass yields each tile's
    share of the gradient.
    """

    @staticmethod
    def forward(ctx, query, key, value, chunks, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = like(query)
        log_normalizer = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for chunk in chunks:
            queries = query[:, :, chunk.start : chunk.end]
            merged = total = None
            for tile in chunk.tiles:
                keys = slice(tile.start, tile.end)
                tensors = (queries, key[:, :, keys], value[:, :, keys])
                part, normalizer = flash(*tensors, attn_mask=tile.mask, scale=scaling)
                if merged is None:
                    merged, total = part, normalizer
                    continue
                new_total = torch.logaddexp(total, normalizer)
                merged = merged * (total - new_total).exp()[..., None].to(part.dtype)
                merged.addcmul_(part, (normalizer - new_total).exp()[..., None].to(part.dtype))
                total = new_total
            output[:, :, chunk.start : chunk.end] = merged
            log_normalizer[:, :, chunk.start : chunk.end] = total
        ctx.save_for_backward(query, key, value, output, log_normalizer)
        ctx.chunks, ctx.scaling = chunks, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, log_normalizer = ctx.saved_tensors
        grad_query, grad_key, grad_value = (like(states, torch.zeros_like) for states in (query, key, value))
        for chunk in ctx.chunks:
            queries = slice(chunk.start, chunk.end)
            of_queries = (output[:, :, queries], log_normalizer[:, :, queries], 0.0, False)
            for tile in chunk.tiles:
                keys = slice(tile.start, tile.end)
                tensors = (grad_output[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys])
                grads = flash_backward(*tensors, *of_queries, attn_mask=tile.mask, scale=ctx.scaling)
                grad_query[:, :, queries] += grads[0]
                grad_key[:, :, keys] += grads[1]
                grad_value[:, :, keys] += grads[2]
        return grad_query, grad_key, grad_value, None, None
