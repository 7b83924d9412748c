"""
What `generate` borrows on a CPU, where a forward has few rows and costs little more than reading the weights: copies
of the weights in the layout that oneDNN multiplies few rows by fastest, and layers that make the most of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .attention_bd3lm import DensePattern, select_tokens
from .layers_bd3lm import (
    BD3LMMLP,
    BD3LMAttention,
    BD3LMDecoderLayer,
    BD3LMLayerNorm,
    FoldedNorm,
    Modulation,
    apply_rotary,
    is_wrapped,
)
from .linear_bd3lm import BD3LMLinear, Lent, PackedWeight, takes_onednn


# When packing pays: it costs about as much as it spares in a dozen forwards of a few rows each.
MIN_PACKED_FORWARDS = 32
MAX_PACKED_ROWS = 64
MAX_PACKED_BYTES = 2**30


def packed(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy of a weight [out, in] in oneDNN's own layout for products with so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)


class PackedLayer(Lent):
    """
    A decoder layer at one modulation, in four matrix products.

    Queries, keys and values come of one product; the gates stand in the weights before them, as shifts and scales do
    in the norms; GELU and the sums with the residual are done within the products.
    """

    def __init__(self, layer: BD3LMDecoderLayer, modulation: Modulation, num_rows: int):
        self.modulation = modulation
        self.attention = attention = layer.self_attn
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.norms = [
            (shift.weight, shift.bias, norm.eps) if isinstance(shift, FoldedNorm) else (norm.weight, None, norm.eps)
            for norm, shift in zip(norms, modulation[::3], strict=True)
        ]
        gates, up, down = modulation[2::3], layer.mlp.up_proj, layer.mlp.down_proj
        gates = [1.0 if gate is None else gate for gate in gates]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = packed(torch.cat([projection.weight for projection in projections]), num_rows)
        self.o = packed((attention.o_proj.weight.t() * gates[0]).t().contiguous(), num_rows)
        self.up, self.up_bias = packed(up.weight, num_rows), up.bias
        self.down = packed((down.weight.t() * gates[1]).t().contiguous(), num_rows)
        self.down_bias = (down.bias * gates[1]).detach()

    @staticmethod
    def can_replace(layer: nn.Module, modulation: Modulation) -> bool:
        """Whether a layer is no more than its weights, with one modulation for all tokens, and nothing drops."""
        if type(layer) is not BD3LMDecoderLayer or (layer.training and layer.self_attn.hidden_dropout > 0):
            return False
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        own = (BD3LMAttention, BD3LMMLP, BD3LMLayerNorm, BD3LMLayerNorm)
        if any(type(module) is not kind for module, kind in zip((attention, mlp, *norms), own, strict=True)):
            return False
        without_bias = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        with_bias = (mlp.up_proj, mlp.down_proj)
        linears = (*without_bias, *with_bias)
        return (
            all(type(linear) is BD3LMLinear for linear in linears)
            and all(linear.bias is None for linear in without_bias)
            and all(linear.bias is not None for linear in with_bias)
            and all(takes_onednn(linear.weight.detach(), linear.weight) for linear in linears)
            and not any(is_wrapped(module) for module in (attention, mlp, *norms, *linears))
            and all(isinstance(shift, FoldedNorm | None) for shift in modulation[::3])
            and all(gate is None or gate.dim() == 1 for gate in modulation[2::3])
        )

    def takes(self, hidden_states: torch.Tensor, modulation: Modulation | None, pattern: Any) -> bool:
        """Whether this pass is one that the packed weights are for."""
        return (
            modulation is self.modulation
            and not torch.is_grad_enabled()
            and isinstance(pattern, DensePattern)
            and takes_onednn(hidden_states, self.up_bias)
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        pattern: DensePattern,
        rotary: tuple[torch.Tensor, torch.Tensor],
        selection: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `BD3LMDecoderLayer.forward`: [batch, length, hidden] -> [batch, selected, hidden]."""
        product = torch.ops.mkldnn._linear_pointwise
        size, head_dim = hidden_states.shape[-1:], self.attention.head_dim
        (weight, bias, eps), (second_weight, second_bias, second_eps) = self.norms
        normed = nn.functional.layer_norm(hidden_states, size, weight, bias, eps)
        heads = product(normed, self.qkv, None, "none", [], "")
        heads = heads.view(*heads.shape[:-1], -1, head_dim).transpose(1, 2)
        num_heads = heads.shape[1] // 3
        # Queries and keys stand at the same positions.
        query_key = apply_rotary(heads[:, : 2 * num_heads], *rotary)
        query, key, value = query_key[:, :num_heads], query_key[:, num_heads:], heads[:, 2 * num_heads :]
        if selection is not None:
            hidden_states = select_tokens(hidden_states, selection)
            query = select_tokens(query.transpose(1, 2).flatten(2), selection)
            query = query.view(*query.shape[:-1], -1, head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.attention.layer_idx)
        output = pattern(self.attention, query, key, value, **kwargs)[0].flatten(-2).contiguous()
        hidden_states = product.binary(output, hidden_states, self.o, None, "add")
        normed = nn.functional.layer_norm(hidden_states, size, second_weight, second_bias, second_eps)
        middle = product(normed, self.up, self.up_bias, "gelu", [], "tanh")
        return product.binary(middle, hidden_states, self.down, self.down_bias, "add")


@contextmanager
def packed_weights(
    model: nn.Module, modulations: list[Modulation] | None, num_rows: int, num_forwards: int
) -> Iterator[None]:
    """
    Lends a BD3-LM on a CPU packed copies of its weights: to whole layers, and to linear maps beside them. It does
    nothing where that does not pay, or would take more than `MAX_PACKED_BYTES`.

    Args:
        model: its `model` holds the layers.
        modulations: those of the layers in the forwards to come, the same objects; None if each has its own.
        num_rows: rows of a usual forward.
        num_forwards: forwards to come.
    """
    linears = [module for module in model.modules() if type(module) is BD3LMLinear]
    num_bytes = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
    pays = num_forwards >= MIN_PACKED_FORWARDS and num_rows <= MAX_PACKED_ROWS and num_bytes <= MAX_PACKED_BYTES
    layers, singles = [], []
    if pays:
        layers = [
            (layer, modulation)
            for layer, modulation in zip(model.model.layers, modulations or [])
            if PackedLayer.can_replace(layer, modulation)
        ]
        inside = {id(module) for layer, _ in layers for module in layer.modules()}
        singles = [
            linear
            for linear in linears
            if id(linear) not in inside and takes_onednn(linear.weight.detach(), linear.weight)
        ]
    try:
        for layer, modulation in layers:
            layer.packed = PackedLayer(layer, modulation, num_rows)
        for linear in singles:
            linear.packed_weight = PackedWeight(packed(linear.weight, num_rows))
        yield
    finally:
        for layer, _ in layers:
            layer.packed = None
        for linear in singles:
            linear.packed_weight = None
