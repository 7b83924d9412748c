"""
Who may attend to whom, and the passes over the attention functions that exploit it.

Every token carries a *visibility code*, `document * stride + block`. With `span = code(query) - code(key)` and the
window of W earlier blocks, the rules of block diffusion are

    denoising pass, and clean to clean:   0 <= span <= W
    noisy to clean:                       1 <= span <= W
    noisy to noisy:                       span == 0

since the stride makes the span between two documents larger than any window. Padding is a document of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Documents lie further apart than any number of blocks.
DOCUMENT_STRIDE = 2**32
# Queries of one chunk of the two-stream walk: large enough for full-speed matrix products, small against the length.
QUERY_CHUNK_SIZE = 128
# A stream has one of so many widths, whatever the noise: kernels that are made per shape, and kept, are few then.
NUM_WIDTHS = 32


def visibility_code(
    position_ids: torch.Tensor,
    block_size: int,
    is_padding: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The code whose differences say who sees whom; see the head of this file.

    Args:
        position_ids: positions counted in real tokens of the row (of the document, if packed) [batch, length].
        block_size: tokens per block.
        is_padding: bool [batch, length].
        document_ids: equal for the tokens of one document of a packed row [batch, length].

    Returns:
        int64 [batch, length].
    """
    code = position_ids.long() // block_size
    if document_ids is not None:
        code = code + document_ids.long() * DOCUMENT_STRIDE
    if is_padding is not None:
        code = code.masked_fill(is_padding, -DOCUMENT_STRIDE)
    return code


def documents_from_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """
    Numbers the documents of packed rows: one starts wherever `position_ids` [batch, length] does not go up by one.
    """
    starts = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    return starts.long().cumsum(-1)


def block_starts(code: torch.Tensor) -> torch.Tensor:
    """True where a block begins: wherever the code [batch, length] changes."""
    return nn.functional.pad(code.diff(dim=-1) != 0, (1, 0), value=True)


def sees(query_code: torch.Tensor, key_code: torch.Tensor, nearest: int, farthest: int) -> torch.Tensor:
    """Whether nearest <= code(query) - code(key) <= farthest; the codes broadcast, the result is bool."""
    span = query_code - key_code
    return (span >= nearest) & (span <= farthest)


def two_stream_sees(
    query_code: torch.Tensor,
    query_copy: torch.Tensor,
    key_code: torch.Tensor,
    key_copy: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """
    The rule of the pass over [x_t ; x_0] (arXiv 2503.09573, Sec. 3.3); all arguments broadcast, the result is bool.

    The copy of a token is 0 in the clean stream and 1, 2, ... in the noisy ones, which do not see each other.
    """
    query_is_noisy, key_is_noisy = query_copy > 0, key_copy > 0
    noisy_to_noisy = query_is_noisy & (query_copy == key_copy) & sees(query_code, key_code, 0, 0)
    noisy_to_clean = query_is_noisy & ~key_is_noisy & sees(query_code, key_code, 1, window)
    clean_to_clean = ~query_is_noisy & ~key_is_noisy & sees(query_code, key_code, 0, window)
    return noisy_to_noisy | noisy_to_clean | clean_to_clean


def select_tokens(states: torch.Tensor, selection: torch.Tensor | slice | None) -> torch.Tensor:
    """
    Picks tokens of each row: [batch, length, size] -> [batch, picked, size].

    Args:
        states: [batch, length, size], or [1, length, size] for all rows.
        selection: columns of each row [batch, picked], the same slice of each, or None for all.
    """
    if selection is None:
        return states
    if isinstance(selection, slice):
        return states[:, selection]
    states = states.expand(selection.shape[0], -1, -1)
    return states.gather(1, selection[..., None].expand(-1, -1, states.shape[-1]))


def flagged_first(flags: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The flagged columns of each row in ascending order, filled up with others to the length of the longest row.

    Args:
        flags: bool [batch, length].
        multiple: the number of columns is rounded up to a multiple of this, as far as there are so many.

    Returns:
        (columns [batch, picked], bool [batch, picked]: which of them are flagged); at least one is picked.
    """
    counts = flags.sum(-1, keepdim=True)
    num_picked = -(-max(int(counts.max()), 1) // multiple) * multiple
    columns = flags.int().argsort(dim=-1, descending=True, stable=True)[:, :num_picked]
    return columns, torch.arange(columns.shape[1], device=flags.device) < counts


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention with the weights returned; [batch, heads, length, head_dim] -> [batch, length, heads, head_dim].
    """
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights.masked_fill(~attention_mask, torch.finfo(attn_weights.dtype).min)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    return torch.matmul(attn_weights, value).transpose(1, 2).contiguous(), attn_weights


def flex_block_mask(mask_function: Callable, query_code: torch.Tensor, key_code: torch.Tensor) -> BlockMask:
    """
    FlexAttention's mask of `mask_function(query code, key code, query index, key index)`.

    Codes are [batch, queries] and [batch, keys]. It is compiled on an accelerator, where that pays.
    """

    batch_size = max(query_code.shape[0], key_code.shape[0])
    query_code, key_code = query_code.expand(batch_size, -1), key_code.expand(batch_size, -1)

    def indexed(batch, head, query, key):
        row = batch if batch_size > 1 else 0
        return mask_function(query_code[row, query], key_code[row, key], query, key)

    num_queries, num_keys, device = query_code.shape[1], key_code.shape[1], query_code.device
    return create_block_mask(
        indexed, batch_size, None, num_queries, num_keys, device=device, _compile=device.type != "cpu"
    )


# Made outside of what is compiled, which would make it again at every step; and never of tensors that are good for
# inference alone, since a later step may train with it.
@torch.compiler.disable
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def plain_two_stream_block_mask(
    length: int, block_size: int, window: int, num_copies: int, last_layer: bool, device: torch.device
) -> BlockMask:
    """The block mask of the pass over [x_t ; x_0] for texts without padding or documents, made once per shape."""
    code = torch.arange(length, device=device)[None] // block_size
    return TwoStreamLayout.of_all_tokens(code, block_size, window, num_copies)._block_mask(last_layer)


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Callable:
    """FlexAttention compiled for each shape by itself: with symbolic shapes torch's CPU template does not compile."""
    return torch.compile(flex_attention, dynamic=False)


def flex_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float
) -> tuple[torch.Tensor, None]:
    """[batch, heads, length, head_dim] -> [batch, length, heads, head_dim]."""
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return attend(query, key, value, block_mask=mask, scale=scaling).transpose(1, 2).contiguous(), None


@dataclass
class DensePattern:
    """
    One call of the attention function for all queries and all keys.

    `mask` is what the implementation takes: None (everything is visible), bool [batch or 1, 1, queries, keys], or a
    BlockMask.
    """

    implementation: str
    mask: object | None = None

    def __call__(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any):
        implementation = self.implementation
        if isinstance(self.mask, BlockMask):
            return flex_attention_forward(module, query, key, value, self.mask.to(query.device), module.scaling)
        if implementation == "flex_attention" or (self.mask is not None and "flash" in implementation):
            # Without a mask there is nothing to be sparse about, and the flash kernels know no block-causal rule: SDPA
            # computes the same.
            implementation = "sdpa"
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # Beside tensors, accelerate moves no arguments from device to device.
        mask = None if self.mask is None else self.mask.to(query.device)
        return attention_function(
            module, query, key, value, mask, scaling=module.scaling, is_causal=False, dropout=0.0, **kwargs
        )


def denoising_pattern(
    implementation: str, query_code: torch.Tensor | None, key_code: torch.Tensor | None, window: int
) -> DensePattern:
    """
    The attention of a denoising pass; codes [batch, queries] and [batch, keys], None if every query sees every key.
    """
    if key_code is None:
        return DensePattern(implementation)
    if implementation == "flex_attention":
        mask = flex_block_mask(lambda query, key, *_: sees(query, key, 0, window), query_code, key_code)
    else:
        mask = sees(query_code[:, None, :, None], key_code[:, None, None, :], 0, window)
    return DensePattern(implementation, mask)


@dataclass
class Tile:
    """Keys [start, end) of a chunk of queries, and which query sees which: bool [batch or 1, 1, queries, keys]."""

    start: int
    end: int
    visible: torch.Tensor

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores; finite, so that a query which sees nothing of this tile gets no NaN."""
        if getattr(self, "_additive_mask", None) is None or self._additive_mask.dtype != dtype:
            mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self._additive_mask = mask.masked_fill_(~self.visible, torch.finfo(dtype).min)
        return self._additive_mask


@dataclass
class QueryChunk:
    """Queries [start, end), and the tiles of keys that they can see."""

    start: int
    end: int
    tiles: list[Tile]


@dataclass
class ChunkedPattern:
    """
    The two-stream pass in chunks of queries, each reading only the keys that it can see; keys lie as [noisy ; clean].
    """

    chunks: list[QueryChunk]

    # Its shapes follow the noise: torch.compile would start anew at every step, and fails on some of them.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any):
        if query.device.type == "cpu":
            return TiledAttention.apply(query, key, value, self.chunks, module.scaling).transpose(1, 2), None
        outputs = []
        for chunk in self.chunks:
            seen_key, seen_value = (
                torch.cat([states[:, :, tile.start : tile.end] for tile in chunk.tiles], dim=2)
                for states in (key, value)
            )
            rows = max(tile.visible.shape[0] for tile in chunk.tiles)
            visible = torch.cat([tile.visible.expand(rows, -1, -1, -1) for tile in chunk.tiles], dim=-1)
            attend = DensePattern("sdpa", visible)
            outputs.append(attend(module, query[:, :, chunk.start : chunk.end], seen_key, seen_value, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


class TiledAttention(torch.autograd.Function):
    """
    Softmax attention over the tiles of each chunk, with the CPU kernel that torch's SDPA calls as well.

    The kernel returns the log-normalizer of its tile, so that a query's tiles are merged exactly and no keys are
    copied (arXiv 2205.14135, Sec. 3.1). Given the merged output and normalizer, its backward pass yields each tile's
    share of the gradient.
    """

    @staticmethod
    def forward(ctx, query, key, value, chunks, scaling):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Tokens before heads in memory, as the output projection reads it.
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        log_normalizer = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for chunk in chunks:
            queries = query[:, :, chunk.start : chunk.end]
            merged = total = None
            for tile in chunk.tiles:
                keys = slice(tile.start, tile.end)
                mask = tile.additive_mask(query.dtype)
                part, normalizer = attend(queries, key[:, :, keys], value[:, :, keys], attn_mask=mask, scale=scaling)
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
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, log_normalizer = ctx.saved_tensors
        grad_query, grad_key, grad_value = (
            torch.zeros_like(states.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for states in (query, key, value)
        )
        for chunk in ctx.chunks:
            queries = slice(chunk.start, chunk.end)
            for tile in chunk.tiles:
                keys = slice(tile.start, tile.end)
                grads = attend_backward(
                    grad_output[:, :, queries],
                    query[:, :, queries],
                    key[:, :, keys],
                    value[:, :, keys],
                    output[:, :, queries],
                    log_normalizer[:, :, queries],
                    0.0,
                    False,
                    attn_mask=tile.additive_mask(query.dtype),
                    scale=ctx.scaling,
                )
                grad_query[:, :, queries] += grads[0]
                grad_key[:, :, keys] += grads[1]
                grad_value[:, :, keys] += grads[2]
        return grad_query, grad_key, grad_value, None, None


@dataclass
class TwoStreamLayout:
    """
    Which tokens take part in the pass over [x_t ; x_0], and what they may see.

    x_t may hold several noised copies of the text, one after the other, for one clean stream.

    Attributes:
        noisy_code, clean_code: visibility codes [batch, num_noisy] and [batch, num_clean]. The noisy tokens of a
            block lie together; clean column i is token i of the text.
        length: tokens of the text.
        block_size: tokens per block.
        window: earlier blocks that a block sees.
        num_copies: noised copies of the text in x_t.
        noisy_columns: the columns of x_t that the noisy stream holds [batch, num_noisy]; None means all.
        queries: the noisy tokens whose final states are wanted, as indices into the noisy stream [batch,
            num_queries]; None means all. The last layer computes no others.
        is_plain: whether both streams are whole, and the text has neither padding nor documents.
    """

    noisy_code: torch.Tensor
    clean_code: torch.Tensor
    length: int
    block_size: int
    window: int
    num_copies: int = 1
    noisy_columns: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    is_plain: bool = False

    @classmethod
    def of_all_tokens(
        cls, code: torch.Tensor, block_size: int, window: int, num_copies: int = 1, is_plain: bool = False
    ) -> "TwoStreamLayout":
        """
        Both streams whole, whatever the noise: the same shapes at every step. Codes may be [1, length] for all rows.
        """
        noisy_code = code.repeat(1, num_copies)
        return cls(noisy_code, code, code.shape[1], block_size, window, num_copies, is_plain=is_plain)

    @classmethod
    def of_predictions(
        cls, code: torch.Tensor, predicted: torch.Tensor, block_size: int, window: int
    ) -> tuple["TwoStreamLayout", torch.Tensor]:
        """
        Only what the predicted tokens depend on: noisy blocks that hold one, and clean tokens before the last such
            block.

        Args:
            code: visibility codes of the text [batch, length], or [1, length] for all rows.
            predicted: bool [batch, copies * length].

        Returns:
            (the layout, bool [batch, num_queries]: which of its queries are predicted tokens, in the order of x_t).
        """
        batch_size, length = predicted.shape[0], code.shape[1]
        num_copies = predicted.shape[1] // length
        code = code.expand(batch_size, -1)
        starts = block_starts(code)
        columns = torch.arange(length, device=code.device)
        first_of_block = torch.where(starts, columns, 0).cummax(-1).values.repeat(1, num_copies)
        block = first_of_block + torch.arange(num_copies, device=code.device).repeat_interleave(length) * length
        block_is_active = torch.zeros_like(predicted).scatter_reduce(1, block, predicted, "amax")
        active = block_is_active.gather(1, block)
        multiple = -(-predicted.shape[1] // NUM_WIDTHS)
        noisy_columns, _ = flagged_first(active, multiple)
        num_clean = int(torch.where(active, first_of_block, 0).max())
        queries, is_prediction = flagged_first(predicted.gather(1, noisy_columns), multiple)
        # Filled up with the row's last prediction, so that a chunk's queries stay close together.
        last = is_prediction.sum(-1, keepdim=True).clamp(min=1) - 1
        queries = torch.where(is_prediction, queries, queries.gather(1, last))
        noisy_code = code.gather(1, noisy_columns % length)
        clean_code = code[:, :num_clean]
        layout = cls(noisy_code, clean_code, length, block_size, window, num_copies, noisy_columns, queries)
        return layout, is_prediction

    @property
    def num_noisy(self) -> int:
        return self.noisy_code.shape[1]

    @property
    def num_clean(self) -> int:
        return self.clean_code.shape[1]

    def select_noisy(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, copies * length] of x_t -> [batch, num_noisy]."""
        if self.noisy_columns is None:
            return tokens
        return tokens.expand(self.noisy_columns.shape[0], -1).gather(1, self.noisy_columns)

    @property
    def final_selection(self) -> torch.Tensor | slice:
        """The last layer's queries among all tokens of both streams, as `select_tokens` takes them."""
        return slice(self.num_noisy) if self.queries is None else self.queries

    def pattern(self, implementation: str, last_layer: bool) -> DensePattern | ChunkedPattern:
        """
        The attention of a layer: dense under `eager`, a block mask under `flex_attention`, else in chunks of queries.
        """
        if implementation == "eager":
            return DensePattern(implementation, self._dense_mask(last_layer))
        if implementation == "flex_attention" and self.is_plain:
            shape = (self.length, self.block_size, self.window, self.num_copies)
            mask = plain_two_stream_block_mask(*shape, last_layer, self.clean_code.device)
            return DensePattern(implementation, mask)
        if implementation == "flex_attention":
            return DensePattern(implementation, self._block_mask(last_layer))
        return ChunkedPattern(self._chunks(last_layer))

    def _columns(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """The columns of x_t that the noisy stream holds, or those of some of its tokens [batch or 1, tokens]."""
        columns = self.noisy_columns
        if columns is None:
            columns = torch.arange(self.num_noisy, device=self.noisy_code.device)[None]
        return columns if queries is None else columns.expand(queries.shape[0], -1).gather(1, queries)

    def _codes_and_copies(self, last_layer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Visibility code and copy of each query of a layer; of each key for any but the last."""
        queries = self.queries if last_layer else None
        code, copy = self.noisy_code, 1 + self._columns(queries) // self.length
        if queries is not None:
            code = code.gather(1, queries)
        if last_layer:
            return code, copy
        clean_copy = copy.new_zeros(copy.shape[0], self.num_clean)
        return torch.cat([code, self.clean_code], dim=1), torch.cat([copy, clean_copy], dim=1)

    def _dense_mask(self, last_layer: bool) -> torch.Tensor:
        query_code, query_copy = self._codes_and_copies(last_layer)
        key_code, key_copy = self._codes_and_copies(last_layer=False)
        return two_stream_sees(
            query_code[:, None, :, None],
            query_copy[:, None, :, None],
            key_code[:, None, None, :],
            key_copy[:, None, None, :],
            self.window,
        )

    def _block_mask(self, last_layer: bool) -> BlockMask:
        query_code, _ = self._codes_and_copies(last_layer)
        key_code, _ = self._codes_and_copies(last_layer=False)
        num_noisy, length, window = self.num_noisy, self.length, self.window

        def copy_of(index):
            return torch.where(index < num_noisy, 1 + index // length, 0)

        def mask_function(query_code, key_code, query, key):
            return two_stream_sees(query_code, copy_of(query), key_code, copy_of(key), window)

        return flex_block_mask(mask_function, query_code, key_code)

    def _chunks(self, last_layer: bool) -> list[QueryChunk]:
        chunks = self._noisy_chunks(self.queries if last_layer else None)
        return chunks if last_layer else chunks + self._clean_chunks()

    def _noisy_chunks(self, queries: torch.Tensor | None) -> list[QueryChunk]:
        chunks = []
        code, columns, stream_columns = self.noisy_code, self._columns(queries), self._columns()
        if queries is not None:
            code = code.gather(1, queries)
        for start in range(0, code.shape[1], QUERY_CHUNK_SIZE):
            end = min(start + QUERY_CHUNK_SIZE, code.shape[1])
            first, last = start, end - 1
            if queries is not None:
                first, last = int(queries[:, start:end].min()), int(queries[:, start:end].max())
            chunk_code, chunk_columns = code[:, None, start:end, None], columns[:, start:end]
            # A block may begin before the chunk and end behind it.
            noisy = slice(max(0, first - self.block_size + 1), min(self.num_noisy, last + self.block_size))
            visible = sees(chunk_code, self.noisy_code[:, None, None, noisy], 0, 0)
            if self.num_copies > 1:
                copy, key_copy = chunk_columns // self.length, stream_columns[:, noisy] // self.length
                visible = visible & (copy[:, None, :, None] == key_copy[:, None, None, :])
            tiles = [Tile(noisy.start, noisy.stop, visible)]
            num_clean = min(int((chunk_columns % self.length).max()), self.num_clean)
            if num_clean:
                visible = sees(chunk_code, self.clean_code[:, None, None, :num_clean], 1, self.window)
                tiles.append(Tile(self.num_noisy, self.num_noisy + num_clean, visible))
            chunks.append(QueryChunk(start, end, tiles))
        return chunks

    def _clean_chunks(self) -> list[QueryChunk]:
        chunks = []
        for start in range(0, self.num_clean, QUERY_CHUNK_SIZE):
            end = min(start + QUERY_CHUNK_SIZE, self.num_clean)
            num_keys = min(end + self.block_size - 1, self.num_clean)
            query_code, key_code = self.clean_code[:, start:end], self.clean_code[:, :num_keys]
            visible = sees(query_code[:, None, :, None], key_code[:, None, None, :], 0, self.window)
            tile = Tile(self.num_noisy, self.num_noisy + num_keys, visible)
            chunks.append(QueryChunk(self.num_noisy + start, self.num_noisy + end, [tile]))
        return chunks
