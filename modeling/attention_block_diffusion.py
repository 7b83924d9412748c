"""
Who may attend to whom, as masks: data that is made outside of the network and passes through it.

Every token has a *block id*, `document * stride + block`. With `span = block_id(query) - block_id(key)` and a window
of W earlier blocks, the rules of block diffusion (arXiv 2503.09573, Sec. 3.3) are

    denoising pass, and clean to clean:   0 <= span <= W
    noisy to clean:                       1 <= span <= W
    noisy to noisy:                       span == 0

since the stride makes the span between two documents larger than any window. Padding is a document of its own.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache


# Documents lie further apart than any number of blocks.
DOCUMENT_STRIDE = 2**32
PADDING_BLOCK = -DOCUMENT_STRIDE


def token_block_ids(
    position_ids: Tensor, block_size: int, is_padding: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """
    The block ids int64 [batch, length] whose differences say who sees whom, from positions [batch, length] counted in
    real tokens of the row, or of the document. `document_ids` are equal for the tokens of one document.
    """
    block_ids = position_ids.long() // block_size
    if document_ids is not None:
        block_ids = block_ids + document_ids.long() * DOCUMENT_STRIDE
    if is_padding is not None:
        block_ids = block_ids.masked_fill(is_padding, PADDING_BLOCK)
    return block_ids


def block_starts(block_ids: Tensor) -> Tensor:
    """True where a block begins: wherever the block id [batch, length] changes."""
    return nn.functional.pad(block_ids.diff(dim=-1) != 0, (1, 0), value=True)


def is_visible(
    query_blocks: Tensor, key_blocks: Tensor, window: int, query_streams: Any = 0, key_streams: Any = 0
) -> Tensor:
    """
    The rules at the head of this file, bool, for block ids that broadcast and a window of so many earlier blocks.

    Streams are 0 for clean tokens and 1, 2, ... for those of each noised copy of the text; copies do not see each
    other. In a denoising pass, without streams, all tokens follow the rule of clean ones.
    """
    # Compared and not subtracted: a span of every pair would take eight times the memory of the mask.
    is_within = (key_blocks <= query_blocks) & (key_blocks >= query_blocks - window)
    if isinstance(query_streams, int) and isinstance(key_streams, int):
        return is_within
    to_clean = is_within & (key_streams == 0) & ((query_streams == 0) | (key_blocks < query_blocks))
    return to_clean | ((query_streams > 0) & (query_streams == key_streams) & (key_blocks == query_blocks))


def block_diffusion_mask(
    query_blocks: Tensor,
    key_blocks: Tensor,
    window: int,
    implementation: str,
    dtype: torch.dtype,
    streams: Tensor | None = None,
) -> Tensor | BlockMask:
    """
    The mask of one pass, for all layers and heads, as an attention implementation takes it for hidden states of a
    dtype: bool [batch or 1, 1, queries, keys]; for `eager` what is added to the scores, of the same shape; for
    `flex_attention` a `BlockMask`.

    Block ids are [batch or 1, queries] and [batch or 1, keys]. In the pass over [x_t ; x_0] `streams` are those of the
    keys ([`is_visible`]), of their shape; the last keys are the queries.
    """
    first = key_blocks.shape[1] - query_blocks.shape[1]
    if implementation != "flex_attention":
        pair = (0, 0) if streams is None else (streams[:, None, first:, None], streams[:, None, None, :])
        visible = is_visible(query_blocks[:, None, :, None], key_blocks[:, None, None, :], window, *pair)
        if implementation != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    batch_size = max(query_blocks.shape[0], key_blocks.shape[0])
    query_blocks, key_blocks = query_blocks.expand(batch_size, -1), key_blocks.expand(batch_size, -1)
    streams = None if streams is None else streams.expand(batch_size, -1)

    def mask_mod(batch, head, query, key):
        # A mask of one row serves all rows of the batch.
        row = batch if batch_size > 1 else 0
        pair = (0, 0) if streams is None else (streams[row, first + query], streams[row, key])
        return is_visible(query_blocks[row, query], key_blocks[row, key], window, *pair)

    device, sizes = query_blocks.device, (query_blocks.shape[1], key_blocks.shape[1])
    return create_block_mask(mask_mod, batch_size, None, *sizes, device=device, _compile=device.type != "cpu")


@lru_cache(maxsize=4)
def plain_two_stream_mask(
    sizes: tuple[int, int, int, int], implementation: str, dtype: torch.dtype, device: torch.device
) -> Tensor | BlockMask:
    """The mask of [x_t ; x_0] for texts without padding or documents, which depends on the shape alone and is kept."""
    length, num_copies, block_size, window = sizes
    # Never made of tensors that are good for inference alone, since a later step may train with it.
    with torch.inference_mode(False):
        blocks = (torch.arange(length, device=device) // block_size).repeat(1, num_copies + 1)
        streams = torch.arange(1, num_copies + 1, device=device).repeat_interleave(length)
        streams = nn.functional.pad(streams, (0, length))[None]
        return block_diffusion_mask(blocks, blocks, window, implementation, dtype, streams)


def denoising_positions_and_blocks(
    config, length: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Positions of the `length` tokens after a cache and their block ids, both [batch or 1, length], and the block ids of
    all keys [batch or 1, keys]; `attention_mask` and `position_ids` are as `forward` takes them.

    Cached tokens are known by their columns, from which each row's positions differ by its left padding.
    """
    cached_length = cache.get_seq_length()
    num_keys, first_key = cache.get_mask_sizes(length, 0)
    columns = torch.arange(length, device=device)[None] + cached_length
    if position_ids is None:
        position_ids = columns
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    num_padding = columns[:, -1:] - position_ids[:, -1:]
    key_columns = torch.arange(num_keys, device=device)[None] + first_key
    key_positions = key_columns - num_padding
    # A static cache has more columns than there are tokens.
    key_is_empty = (key_positions < 0) | (key_columns >= cached_length + length)
    query_is_padding = None
    if attention_mask is not None:
        is_padding = attention_mask == 0
        query_is_padding = is_padding[:, -length:]
        key_is_empty = key_is_empty | is_padding[:, key_columns[0].clamp(max=is_padding.shape[1] - 1)]
    query_blocks = token_block_ids(position_ids, config.block_size, query_is_padding)
    return position_ids, query_blocks, token_block_ids(key_positions, config.block_size, key_is_empty)
