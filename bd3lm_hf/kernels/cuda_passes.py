"""
What the passes over one block share on a GPU. There a forward of a few tokens takes as long as its operations take to
be launched, so positions, angles of the rotary embedding and the mask, in the form that SDPA takes, are made once for
all steps and layers.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from ..modeling.cache_block_diffusion import CommitCache
from .cuda_layers import FastNetwork


# In elements: SDPA copies a mask whose rows do not begin at multiples of it, in each layer.
MASK_ALIGNMENT = 16


def share_passes(call: Any) -> None:
    """Lets the passes of a denoiser whose steps are not captured share what depends on the block alone."""
    # The denoiser holds the cache, and is to be freed at once.
    call.prepare_pass = functools.partial(prepare_shared, weakref.proxy(call))


def prepare_shared(call: Any, task: Any) -> None:
    """As `Denoiser.prepare_pass`."""
    text, before = call.text, task.inputs
    num_clean = text.num_columns - text.num_cached
    if not (isinstance(call.model, FastNetwork) and sees_all(call) and num_clean <= call.piece_size):
        call.__class__.prepare_pass(call, task)
        if task.inputs is not before:
            masks, dtype = task.inputs["attention_mask"], mask_dtype(call)
            is_one = not isinstance(masks, dict)
            masks = {name: aligned(mask, dtype) for name, mask in ({"": masks} if is_one else masks).items()}
            task.inputs["attention_mask"] = masks[""] if is_one else masks
        return
    if task.num_cached == text.num_cached:
        return
    task.clean, task.num_cached = text.pending, text.num_cached
    positions = torch.arange(text.num_cached, text.num_columns + call.canvas.block_size, device=text.ids.device)
    # Without clean tokens the block sees all that there is.
    seen = seen_columns(call, positions, len(positions) + text.num_cached)[None, None] if num_clean else None
    mask = None if seen is None else aligned(seen, mask_dtype(call))
    view, positions = CommitCache(call.cache, num_clean), positions[None]
    task.inputs = {"position_ids": positions, "attention_mask": mask, "cache": view}
    task.inputs["angles"] = call.model.angles(positions)


def is_plain(call: Any) -> bool:
    """Whether the mask of a pass depends on its length alone: no padding, and all of the text is seen."""
    config, text = call.config, call.text
    return (
        text.is_plain
        and not call.generation_config.new_block
        and text.num_columns <= call.window
        and config.clean_attention == "block"
        and [*config.sliding_windows.values()] == [None]
    )


def sees_all(call: Any) -> bool:
    """Whether the block of a pass [`is_plain`] is given no column by the cache that it does not see."""
    has_cache = call.cache is not None and call.guidance is None
    return has_cache and is_plain(call) and not any(isinstance(layer, StaticLayer) for layer in call.cache.layers)


def seen_columns(call: Any, positions: Tensor, num_columns: int) -> Tensor:
    """Which columns plain rows see at `positions` [queries], bool [queries, num_columns]."""
    block_size = call.canvas.block_size
    columns = torch.arange(num_columns, device=positions.device)
    return columns < (positions // block_size * block_size + block_size)[:, None]


def mask_dtype(call: Any) -> torch.dtype | None:
    """That of the mask that SDPA takes without a change; None under autocast, where queries are of another."""
    is_autocast = torch.is_autocast_enabled(call.canvas.tokens.device.type)
    return None if is_autocast else call.model.dtype


def additive(mask: Tensor, dtype: torch.dtype | None, hidden: float = -torch.inf) -> Tensor:
    """A bool mask as what SDPA would make of it in each layer: added to the scores; anything else as it is."""
    if mask.dtype != torch.bool or dtype is None:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, hidden)


def aligned(mask: Any, dtype: torch.dtype | None) -> Any:
    """[`additive`], with rows that begin at multiples of MASK_ALIGNMENT; anything but a bool tensor as it is."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or dtype is None:
        return mask
    num_keys = mask.shape[-1]
    room = mask.new_empty(*mask.shape[:-1], -(-num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT, dtype=dtype)
    return room[..., :num_keys].zero_().masked_fill_(~mask, -torch.inf)
