"""
What `generate` uses on a CPU, where a forward has few rows and costs little more than reading the weights: copies of
the weights in the layout that oneDNN multiplies few rows by fastest, and layers that are computed in four products.

All of it lives in a dictionary for one call of `generate`, and in a context variable, so that other threads and copies
of the model see nothing of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .cpu_attention import attend
from .cpu_linear import HAS_ONEDNN


# When packing pays: it costs about as much as it spares in a dozen forwards of a few rows each.
MIN_PACKED_FORWARDS = 16
MAX_PACKED_ROWS = 64
MAX_PACKED_BYTES = 2**30


@dataclass
class PackedWeights:
    """
    What one call of `generate` has.

    Attributes:
        model: the network that they are of.
        condition: the embedded noise level, where that is constant.
        layers: for each decoder layer of a constant noise level what takes its place.
        linears: for other linear maps their weight in oneDNN's layout.
    """

    model: nn.Module
    condition: torch.Tensor | None
    layers: dict[nn.Module, "PackedLayer"]
    linears: dict[nn.Module, torch.Tensor]


_IN_USE: ContextVar[PackedWeights | None] = ContextVar("packed_weights", default=None)


def packed_weights() -> PackedWeights | None:
    """Those of the call of `generate` that this is a part of; none in what is compiled, which can't ask."""
    return None if torch.compiler.is_compiling() else _IN_USE.get()


def pack(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy of a weight [out, in] in oneDNN's own layout for products with so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)


def packed_product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., in] x a packed weight [out, in] -> [..., out]."""
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, "none", [], "")


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys [batch, heads, length, head_dim] to their positions, writing one tensor."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


class PackedLayer:
    """
    A decoder layer at one noise level, in four matrix products.

    Queries, keys and values come of one product; shifts and scales are folded into the norms, gates into the weights;
    GELU and the sums with the residual are done within the products.
    """

    def __init__(self, layer: nn.Module, modulation: tuple[torch.Tensor | None, ...], num_rows: int):
        """`modulation`: shift, scale and gate of the attention, then of the MLP, each [hidden] or None."""
        attention, up, down = layer.self_attn, layer.mlp.up_proj, layer.mlp.down_proj
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.norms = [
            (*folded_norm(norm, shift, scale), norm.eps)
            for norm, shift, scale in zip(norms, modulation[::3], modulation[1::3], strict=True)
        ]
        gates = [1.0 if gate is None else gate[:, None] for gate in modulation[2::3]]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = pack(torch.cat([projection.weight for projection in projections]), num_rows)
        self.o = pack(gates[0] * attention.o_proj.weight, num_rows)
        self.up, self.up_bias = pack(up.weight, num_rows), up.bias.detach()
        self.down = pack(gates[1] * down.weight, num_rows)
        self.down_bias = (gates[1] * down.bias[:, None])[:, 0].detach()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
    ) -> torch.Tensor:
        """As `BD3LMDecoderLayer.forward`: [batch, length, hidden] -> [batch, length, hidden]."""
        product = torch.ops.mkldnn._linear_pointwise
        size = hidden_states.shape[-1:]
        (weight, bias, eps), (second_weight, second_bias, second_eps) = self.norms
        normed = nn.functional.layer_norm(hidden_states, size, weight, bias, eps)
        heads = product(normed, self.qkv, None, "none", [], "")
        heads = heads.view(*heads.shape[:-1], -1, self.head_dim).transpose(1, 2)
        num_heads = heads.shape[1] // 3
        # Queries and keys are at the same positions.
        query_key = rotate(heads[:, : 2 * num_heads], *position_embeddings)
        query, key, value = query_key[:, :num_heads], query_key[:, num_heads:], heads[:, 2 * num_heads :]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output = attend(query, key, value, attention_mask, self.scaling)
        hidden_states = product.binary(output.contiguous(), hidden_states, self.o, None, "add")
        normed = nn.functional.layer_norm(hidden_states, size, second_weight, second_bias, second_eps)
        middle = product(normed, self.up, self.up_bias, "gelu", [], "tanh")
        return product.binary(middle, hidden_states, self.down, self.down_bias, "add")


def folded_norm(
    norm: nn.LayerNorm, shift: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the layer norm that computes `norm(x) * (1 + scale) + shift`, both [hidden]."""
    return (norm.weight, None) if shift is None else (norm.weight * (1 + scale), shift)


@contextmanager
def using(weights: PackedWeights | None) -> Iterator[None]:
    """Lets what runs within this context find `weights`."""
    token = _IN_USE.set(weights)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def pays(weights: list[torch.Tensor], num_rows: int, num_forwards: int) -> bool:
    """Whether to pack these weights for so many forwards of so many rows."""
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    is_often = num_forwards >= MIN_PACKED_FORWARDS and num_rows <= MAX_PACKED_ROWS
    return HAS_ONEDNN and torch.backends.mkldnn.enabled and is_often and num_bytes <= MAX_PACKED_BYTES


def expected_forwards(generation_config: Any, num_new_tokens: int, block_size: int) -> int:
    """About how many forwards `generate` runs; at most one per token."""
    steps = generation_config.denoising_steps
    per_block = block_size if steps is None else min(steps, block_size)
    return num_new_tokens * per_block // block_size
