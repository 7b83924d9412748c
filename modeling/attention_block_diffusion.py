"""
Who may attend to whom, as masks: data that is made outside of the network and passes through it.

Every token has a *block id*, `document * stride + block`. With `span = block_id(query) - block_id(key)` and a window
of W earlier blocks, the rules of block diffusion (arXiv 2503.09573, Sec. 3.3) are

    denoising pass, and clean to clean:   0 <= span <= W
    noisy to clean:                       1 <= span <= W
    noisy to noisy:                       span == 0

since the stride makes the span between two documents larger than any window. Padding is a document of its own. Two
things may narrow them: a layer with a sliding window sees so many positions back, and a clean stream that is read
causally (as the autoregressive model that a network comes from reads it) sees nothing after a token in its own block.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache


# Documents lie further apart than any number of blocks.
DOCUMENT_STRIDE = 2**32
PADDING_BLOCK = -DOCUMENT_STRIDE


class Tokens(NamedTuple):
    """
    What decides who sees whom, of each token of a pass [batch or 1, length]; a number holds for all of them.

    Attributes:
        block_ids: see [`token_block_ids`].
        position_ids: counted within the row, or the document.
        streams: in the pass over [x_t ; x_0], 0 for clean tokens and 1, 2, ... for those of each noised copy.
        is_causal: whether a query sees no later position of its own block.
    """

    block_ids: Tensor
    position_ids: Tensor | int = 0
    streams: Tensor | int = 0
    is_causal: Tensor | bool = False

    def each(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """With a function of each tensor in its place."""
        return Tokens(*(function(value) if isinstance(value, Tensor) else value for value in self))


class MaskKind(NamedTuple):
    """
    What a configuration says of masks: how many earlier blocks are seen (`window`); for each type of layers, how many
    positions they see, the query's own included, or None (`sliding_windows`); whether clean tokens see no later
    position of their own block; and the attention implementation and `dtype` of hidden states that masks are for.
    """

    block_size: int
    window: int
    sliding_windows: tuple[tuple[str, int | None], ...]
    clean_is_causal: bool
    implementation: str
    dtype: torch.dtype

    @classmethod
    def of(cls, config, dtype: torch.dtype) -> "MaskKind":
        """The kind of masks that a network of a `config` takes for hidden states of a `dtype`."""
        windows = tuple(sorted(config.sliding_windows.items()))
        rules = (config.block_size, config.window_in_blocks, windows, config.clean_attention == "causal")
        return cls(*rules, config.get_text_config(decoder=True)._attn_implementation, dtype)


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
    return block_ids if is_padding is None else block_ids.masked_fill(is_padding, PADDING_BLOCK)


def block_starts(block_ids: Tensor) -> Tensor:
    """True where a block begins: wherever the block id [batch, length] changes."""
    return nn.functional.pad(block_ids.diff(dim=-1) != 0, (1, 0), value=True)


def without_masked(block_ids: Tensor, is_masked: Tensor) -> Tensor:
    """Whether the block of each token holds no masked one, bool [..., length], from `is_masked` of that shape."""
    block = (block_starts(block_ids).long().cumsum(-1) - 1).expand(is_masked.shape)
    return torch.zeros_like(block).scatter_add_(-1, block, is_masked.long()).gather(-1, block) == 0


def is_visible(query: Tokens, key: Tokens, window: int, sliding_window: int | None = None) -> Tensor:
    """
    The rules at the head of this file, bool, for tokens whose fields broadcast, a window of so many earlier blocks and
    a sliding one of so many positions. Copies of the text do not see each other. Without streams, in a denoising pass,
    all tokens follow the rule of clean ones.
    """
    # Compared and not subtracted: a span of every pair would take eight times the memory of the mask.
    visible = (key.block_ids <= query.block_ids) & (key.block_ids >= query.block_ids - window)
    if not (isinstance(query.streams, int) and isinstance(key.streams, int)):
        earlier = visible & (key.streams == 0) & ((query.streams == 0) | (key.block_ids < query.block_ids))
        own = (query.streams > 0) & (query.streams == key.streams) & (key.block_ids == query.block_ids)
        visible = earlier | own
    if query.is_causal is not False:
        visible = visible & ~(query.is_causal & (key.position_ids > query.position_ids))
    if sliding_window is not None:
        visible = visible & (key.position_ids > query.position_ids - sliding_window)
    return visible


def block_diffusion_mask(query: Tokens, key: Tokens, kind: MaskKind) -> Any:
    """
    The mask of one pass, for all heads, as the attention implementation takes it: bool [batch or 1, 1, queries, keys];
    for `eager` what is added to the scores, of the same shape; for `flex_attention` a `BlockMask`. One mask for all
    layers, or where these are of several types, a dictionary with one for each.
    """
    masks = {name: mask_of_layers(query, key, kind, width) for name, width in kind.sliding_windows}
    return masks if len(masks) > 1 else masks.popitem()[1]


def mask_of_layers(query: Tokens, key: Tokens, kind: MaskKind, sliding_window: int | None) -> Tensor | BlockMask:
    """[`block_diffusion_mask`] for layers with one sliding window, or None."""
    if kind.implementation != "flex_attention":
        queries, keys = query.each(lambda ids: ids[:, None, :, None]), key.each(lambda ids: ids[:, None, None, :])
        visible = is_visible(queries, keys, kind.window, sliding_window)
        if kind.implementation != "eager":
            return visible
        return torch.zeros_like(visible, dtype=kind.dtype).masked_fill_(~visible, torch.finfo(kind.dtype).min)

    batch_size = max(len(value) for value in (*query, *key) if isinstance(value, Tensor))
    query, key = (tokens.each(lambda ids: ids.expand(batch_size, -1)) for tokens in (query, key))

    def mask_mod(batch, head, query_index, key_index):
        # A mask of one row serves all rows of the batch.
        row = batch if batch_size > 1 else 0
        pair = (query.each(lambda ids: ids[row, query_index]), key.each(lambda ids: ids[row, key_index]))
        return is_visible(*pair, kind.window, sliding_window)

    device, sizes = query.block_ids.device, (query.block_ids.shape[1], key.block_ids.shape[1])
    return create_block_mask(mask_mod, batch_size, None, *sizes, device=device, _compile=device.type != "cpu")


@lru_cache(maxsize=4)
def plain_two_stream_mask(length: int, num_copies: int, kind: MaskKind, device: torch.device) -> Any:
    """The mask of [x_t ; x_0] for texts without padding or documents, which depends on the shape alone and is kept."""
    # Never made of tensors that are good for inference alone, since a later step may train with it.
    with torch.inference_mode(False):
        positions = torch.arange(length, device=device).repeat(1, num_copies + 1)
        streams = torch.arange(1, num_copies + 1, device=device).repeat_interleave(length)
        streams = nn.functional.pad(streams, (0, length))[None]
        tokens = Tokens(positions // kind.block_size, positions, streams, kind.clean_is_causal and streams == 0)
        return block_diffusion_mask(tokens, tokens, kind)


def denoising_tokens(
    config, length: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
) -> tuple[Tokens, Tokens]:
    """
    The `length` tokens after a cache, whose fields are [batch or 1, length], and all keys [batch or 1, keys];
    `attention_mask` and `position_ids` are as `forward` takes them. Cached tokens are known by their columns, from
    which each row's positions differ by its left padding.
    """
    cached_length = cache.get_seq_length()
    num_keys, first_key = cache.get_mask_sizes(length, 0)
    columns = torch.arange(length, device=device)[None] + cached_length
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    position_ids = columns if position_ids is None else position_ids
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
    query = Tokens(token_block_ids(position_ids, config.block_size, query_is_padding), position_ids)
    return query, Tokens(token_block_ids(key_positions, config.block_size, key_is_empty), key_positions)
