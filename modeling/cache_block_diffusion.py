"""The cache of clean blocks: what a pass adds to it, and the layer that holds a window of keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer


class CommitCache(Cache):
    """
    A view of a cache whose `update` writes only the first `num_commit` incoming positions and returns all of them.

    With 0 a denoising pass reads the cache and leaves it as is. With n, the pass over [n clean tokens ; noisy block]
    commits the clean tokens and denoises the block in one forward; the attention code is unaware of it. The `cache` is
    a dynamic, static or dynamic sliding one; others of Transformers' are called the same way. Static sliding layers
    are refused. `seen` may leave out columns that the mask leaves out as well.
    """

    def __init__(self, cache: Cache, num_commit: int, seen: slice | None = None):
        self.__dict__.update(vars(cache))
        self.cache, self.num_commit, self.seen = cache, num_commit, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, layer_idx)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """
        As `Cache.update`, but that all positions after the first `num_commit` are returned without being kept: keys
        and values [batch, heads, cached + length, head_dim]. Raises a ValueError for layers static and sliding.
        """
        states = self._update(key_states, value_states, layer_idx, *args, **kwargs)
        return states if self.seen is None else tuple(part[:, :, self.seen] for part in states)

    def _update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        num_transient = key_states.shape[-2] - self.num_commit
        layer = self.cache.layers[layer_idx] if layer_idx < len(self.cache.layers) else None
        # Older ones have one dtype for both, which under autocast are of two.
        value_states = value_states.to(key_states.dtype) if isinstance(layer, StaticLayer) else value_states
        if num_transient <= 0:
            return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, StaticSlidingWindowLayer):
            got = "some; take `StaticCache` or `DynamicCache`"
            raise ValueError(f"`cache` must not have static sliding layers, but got {got}.")
        if isinstance(layer, StaticLayer):
            # The transient positions come after the committed ones, and the next write goes over them.
            states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
            layer.cumulative_length.sub_(num_transient)
            return states
        if self.num_commit == 0 and (layer is None or not layer.is_initialized):
            return key_states, value_states
        if isinstance(layer, WindowLayer) and not self.cache.offloading:
            return layer.update(key_states, value_states, num_commit=self.num_commit)
        sizes = (self.num_commit, num_transient)
        (keys, more_keys), (values, more_values) = (part.split(sizes, dim=-2) for part in (key_states, value_states))
        is_plain_layer = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if self.num_commit == 0 and is_plain_layer and not self.cache.offloading:
            keys, values = layer.keys, layer.values
        else:
            keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return torch.cat([keys, more_keys], dim=-2), torch.cat([values, more_values], dim=-2)


def read_whole_text(cache: Cache, max_cache_len: int = 0) -> None:
    """
    Gives an empty cache whole layers in place of sliding ones, since masks say what a layer sees; static ones of at
    least so many positions. Raises a ValueError where some layers hold a whole text and others the end of it.
    """
    is_sliding = [type(layer) in (DynamicSlidingWindowLayer, StaticSlidingWindowLayer) for layer in cache.layers]
    if not any(is_sliding):
        return
    if cache.get_seq_length():
        if not all(is_sliding):
            raise ValueError("`cache` must hold the whole text in all layers, but got sliding ones among them.")
        return
    lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    for index in (index for index, layer_is_sliding in enumerate(is_sliding) if layer_is_sliding):
        is_static = isinstance(cache.layers[index], StaticLayer)
        cache.layers[index] = StaticLayer(max(max_cache_len, *lengths)) if is_static else DynamicLayer()


class WindowLayer(DynamicSlidingWindowLayer):
    """
    A sliding layer of fixed capacity that is written in place, and whose window may be widened while it is in use. Its
    keys and values are views of buffers [batch, heads, capacity, head_dim]. Positions are added at their end, also the
    transient ones of a denoising pass, which the next pass overwrites. A full one is left for another.
    """

    def __init__(self, window: int):
        # Transformers counts the token that is being predicted as part of the window.
        super().__init__(sliding_window=window + 1)
        # The keys' and the values', where in them the layer begins, and the view of its keys.
        self._buffers, self._start, self._held = [], 0, None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        num_held = self.keys.shape[-2] if self.cumulative_length else 0
        return num_held + query_length, self.cumulative_length - num_held

    def reset(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0

    def update(self, key_states, value_states, *args, num_commit: int | None = None, **kwargs: Any) -> tuple:
        """What is held, then what is given [batch, heads, length, head_dim]; the first `num_commit` of it are kept."""
        states, num_commit = (key_states, value_states), key_states.shape[-2] if num_commit is None else num_commit
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.keys, self.values = (part[:, :, :0] for part in states)
        num_held, pairs = self.keys.shape[-2], ((self.keys, key_states), (self.values, value_states))
        if torch.is_grad_enabled():
            # What is kept for a gradient must not be overwritten.
            full = tuple(torch.cat(pair, dim=-2) for pair in pairs)
        else:
            end = num_held + key_states.shape[-2]
            if not self._has_room(states, end):
                self._buffers, self._start = [with_room(*pair) for pair in pairs], 0
            full = tuple(buffer[:, :, self._start : self._start + end] for buffer in self._buffers)
            for part, given in zip(full, states):
                part[:, :, num_held:] = given
        if num_commit:
            kept = slice(max(0, num_held + num_commit - self.sliding_window + 1), num_held + num_commit)
            self.keys, self.values = (part[:, :, kept] for part in full)
            self._start += kept.start
            self._held = None if torch.is_grad_enabled() else self.keys
            self.cumulative_length += num_commit
        return full

    def _has_room(self, states: tuple[Tensor, Tensor], length: int) -> bool:
        """Whether the layer lies in buffers, of the dtypes of `states`, in which so many positions can be written."""
        # Methods of Transformers' caches put other tensors in the place of what is held: of rows reordered, say.
        return self._held is self.keys and all(
            buffer.dtype == given.dtype
            and buffer.shape[-2] >= self._start + length
            and (torch.is_inference_mode_enabled() or not buffer.is_inference())
            for buffer, given in zip(self._buffers, states)
        )


def with_room(held: Tensor, states: Tensor) -> Tensor:
    """A buffer [batch, heads, capacity, head_dim] that begins with `held`, for `states` and more."""
    num_held = held.shape[-2]
    shape = (*states.shape[:2], num_held + states.shape[-2] + max(num_held // 4, 64), states.shape[-1])
    buffer = torch.empty(shape, dtype=torch.promote_types(held.dtype, states.dtype), device=states.device)
    buffer[:, :, :num_held] = held
    return buffer
