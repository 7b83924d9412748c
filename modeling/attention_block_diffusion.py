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

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache


# Documents lie further apart than any number of blocks.
DOCUMENT_STRIDE = 2**32
PADDING_BLOCK = -DOCUMENT_STRIDE


def token_block_ids(
    position_ids: torch.Tensor,
    block_size: int,
    is_padding: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The block ids whose differences say who sees whom; see the head of this file.

    Args:
        position_ids: positions counted in real tokens of the row (of the document, if packed) [batch, length].
        block_size: tokens per block.
        is_padding: bool [batch, length].
        document_ids: equal for the tokens of one document of a packed row [batch, length].

    Returns:
        int64 [batch, length].
    """
    block_ids = position_ids.long() // block_size
    if document_ids is not None:
        block_ids = block_ids + document_ids.long() * DOCUMENT_STRIDE
    if is_padding is not None:
        block_ids = block_ids.masked_fill(is_padding, PADDING_BLOCK)
    return block_ids


def documents_from_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """
    Numbers the documents of packed rows: one starts wherever `position_ids` [batch, length] does not go up by one.
    """
    starts = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    return starts.long().cumsum(-1)


def block_starts(block_ids: torch.Tensor) -> torch.Tensor:
    """True where a block begins: wherever the block id [batch, length] changes."""
    return nn.functional.pad(block_ids.diff(dim=-1) != 0, (1, 0), value=True)


def is_visible(
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    window: int,
    query_streams: torch.Tensor | int = 0,
    key_streams: torch.Tensor | int = 0,
) -> torch.Tensor:
    """
    The rules at the head of this file; all arguments broadcast, the result is bool.

    Args:
        query_blocks, key_blocks: block ids.
        window: earlier blocks that a block sees.
        query_streams, key_streams: 0 for clean tokens, 1, 2, ... for those of each noised copy of the text; copies do
            not see each other. In a denoising pass all tokens follow the rule of clean ones.
    """
    span = query_blocks - key_blocks
    if isinstance(query_streams, int) and isinstance(key_streams, int):
        return (span >= 0) & (span <= window)
    query_is_noisy, key_is_noisy = query_streams > 0, key_streams > 0
    noisy_to_noisy = query_is_noisy & (query_streams == key_streams) & (span == 0)
    noisy_to_clean = query_is_noisy & ~key_is_noisy & (span >= 1) & (span <= window)
    clean_to_clean = ~query_is_noisy & ~key_is_noisy & (span >= 0) & (span <= window)
    return noisy_to_noisy | noisy_to_clean | clean_to_clean


def attention_mask_of(visible: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask that an implementation takes of bool [batch or 1, 1, queries, keys]; `eager` adds it to the scores."""
    if implementation != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def block_diffusion_mask(
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    window: int,
    implementation: str,
    dtype: torch.dtype,
    query_streams: torch.Tensor | None = None,
    key_streams: torch.Tensor | None = None,
) -> torch.Tensor | BlockMask:
    """
    The mask of one pass, for all layers and heads.

    Args:
        query_blocks, key_blocks: block ids [batch or 1, queries] and [batch or 1, keys].
        window: earlier blocks that a block sees.
        implementation: name of the attention implementation.
        dtype: that of the hidden states.
        query_streams, key_streams: see [`is_visible`], of the shapes of the block ids; None in a denoising pass.

    Returns:
        bool [batch or 1, 1, queries, keys]; for `eager` what is added to the scores, of the same shape; for
        `flex_attention` a `BlockMask`.
    """
    is_two_stream = query_streams is not None
    if implementation != "flex_attention":
        streams = (query_streams[:, None, :, None], key_streams[:, None, None, :]) if is_two_stream else (0, 0)
        visible = is_visible(query_blocks[:, None, :, None], key_blocks[:, None, None, :], window, *streams)
        return attention_mask_of(visible, implementation, dtype)

    batch_size = max(query_blocks.shape[0], key_blocks.shape[0])
    query_blocks, key_blocks = query_blocks.expand(batch_size, -1), key_blocks.expand(batch_size, -1)
    if is_two_stream:
        query_streams, key_streams = query_streams.expand(batch_size, -1), key_streams.expand(batch_size, -1)

    def mask_mod(batch, head, query, key):
        # A mask of one row serves all rows of the batch.
        row = batch if batch_size > 1 else 0
        streams = (query_streams[row, query], key_streams[row, key]) if is_two_stream else (0, 0)
        return is_visible(query_blocks[row, query], key_blocks[row, key], window, *streams)

    device = query_blocks.device
    sizes = (query_blocks.shape[1], key_blocks.shape[1])
    return create_block_mask(mask_mod, batch_size, None, *sizes, device=device, _compile=device.type != "cpu")


@lru_cache(maxsize=4)
def plain_two_stream_mask(
    length: int,
    block_size: int,
    window: int,
    num_copies: int,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | BlockMask:
    """The mask of [x_t ; x_0] for texts without padding or documents: it depends on the shape alone, and is kept."""
    # Never made of tensors that are good for inference alone, since a later step may train with it.
    with torch.inference_mode(False):
        blocks = torch.arange(length, device=device)[None] // block_size
        streams = torch.arange(1, num_copies + 1, device=device).repeat_interleave(length)
        streams = nn.functional.pad(streams, (0, length))[None]
        blocks = blocks.repeat(1, num_copies + 1)
        return block_diffusion_mask(blocks, blocks, window, implementation, dtype, streams, streams)


def denoising_positions_and_blocks(
    config,
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where earlier tokens lie in a cache: positions of the `length` tokens given and their block ids, both [batch or 1,
    length], and the block ids of all keys [batch or 1, keys].

    `attention_mask` [batch, cached + length] and `position_ids` [batch, length] are as `forward` takes them.
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
