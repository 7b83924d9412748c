"""The decoder layer on a CPU: the functions that keep less for the gradients, and the attention that sees less."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cpu_attention import WantedQueries, attend, notes_of, wanted_queries
from .cpu_generation import PackedWeights, folded_norm, packed_product, packed_weights, rotate
from .cpu_linear import MLP, GatedLinear, NormedLinear, linear
from .cpu_plain import HARMLESS_ARGUMENTS, has_hooks, is_mask, is_plain, is_plain_layer, is_sdpa


# Shift, scale and gate: [hidden] where they are alike for all tokens, [batch, length or 1, hidden], or None.
Modulation = tuple[torch.Tensor | None, ...]
Rotary = tuple[torch.Tensor, torch.Tensor]


def layer_forward(classes: dict[str, type], original: Callable) -> Callable:
    """What takes the place of `BD3LMDecoderLayer.forward`, for layers of these classes."""

    @functools.wraps(original)
    def forward(self, hidden_states, attention_mask, position_embeddings, condition=None, cache=None, **kwargs):
        surplus = {name for name, value in kwargs.items() if value is not None} - HARMLESS_ARGUMENTS
        is_taken = (
            is_plain(hidden_states)
            and is_mask(attention_mask)
            and not surplus
            and is_plain_layer(self, classes, hidden_states.dtype)
        )
        weights = packed_weights()
        if is_taken and weights is not None and is_for_packed(self, weights):
            return weights.layers[self](hidden_states, attention_mask, position_embeddings, cache)
        if not is_taken or not is_sdpa(self):
            inputs = (hidden_states, attention_mask, position_embeddings, condition)
            return original(self, *inputs, cache=cache, **kwargs)
        modulation = modulation_of(self, condition, hidden_states.dtype)
        wanted = wanted_of(self, attention_mask, modulation, cache)
        if wanted is not None:
            return last_layer(self, hidden_states, attention_mask, position_embeddings, modulation, wanted)
        query, key, value = project(self.input_layernorm, modulation, hidden_states, *projections_of(self))
        seen = attention_of(self, query, key, value, attention_mask, position_embeddings, position_embeddings, cache)
        hidden_states = add_attention(self, hidden_states, seen, modulation[2], dropout_of(self, hidden_states))
        return add_mlp(self, hidden_states, modulation[3:], dropout_of(self, hidden_states))

    # Transformers wraps the `forward` of such layers, where their class is made, in what checkpoints them.
    return type(original.__name__, (GradientCheckpointingLayer,), {"forward": forward}).forward


def is_for_packed(layer: nn.Module, weights: PackedWeights) -> bool:
    """Whether this is a pass that the packed weights are for."""
    is_inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return is_inference and layer in weights.layers and not (layer.training and layer.hidden_dropout > 0)


def modulation_of(layer: nn.Module, condition: torch.Tensor | None, dtype: torch.dtype) -> Modulation:
    """Shift, scale and gate of the attention, then of the MLP."""
    if condition is None:
        return (None,) * 6
    parts = layer.adaln_modulation(condition).to(dtype)
    return (parts.flatten() if condition.shape[:-1].numel() == 1 else parts).chunk(6, dim=-1)


def is_constant(part: torch.Tensor | None) -> bool:
    """Whether a part of the modulation is alike for all tokens."""
    return part is None or part.dim() == 1


def projections_of(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Those to queries, keys and values."""
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def apply_linear(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """A linear map of states [..., in], by its packed weight where `generate` has one."""
    weights = None if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") else packed_weights()
    if weights is not None and module in weights.linears:
        return packed_product(states, weights.linears[module], module.bias)
    return linear(states, module.weight, module.bias)


def project(
    norm: nn.LayerNorm, modulation: Modulation, states: torch.Tensor, *projections: nn.Linear
) -> tuple[torch.Tensor, ...]:
    """Each projection of the layer norm of the states [..., hidden]; `modulation` begins with its shift and scale."""
    shift, scale = modulation[:2]
    if torch.is_grad_enabled() and is_constant(shift):
        weights = (projection.weight for projection in projections)
        return NormedLinear.apply(states, *folded_norm(norm, shift, scale), norm.eps, *weights)
    normed = modulated_norm(norm, shift, scale, states)
    return tuple(apply_linear(projection, normed) for projection in projections)


def modulated_norm(
    norm: nn.LayerNorm, shift: torch.Tensor | None, scale: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift, [..., hidden]."""
    size = states.shape[-1:]
    if is_constant(shift):
        return nn.functional.layer_norm(states, size, *folded_norm(norm, shift, scale), norm.eps)
    return nn.functional.layer_norm(states, size, norm.weight, None, norm.eps) * (1 + scale) + shift


class Rotate(torch.autograd.Function):
    """[`rotate`], whose gradient is rotated back."""

    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def attention_of(
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    query_rotary: Rotary,
    key_rotary: Rotary,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Attention from projected queries [batch, queries, hidden] to keys and values: [batch, queries, hidden]."""
    attention = layer.self_attn

    def heads(states: torch.Tensor, rotary: Rotary | None = None) -> torch.Tensor:
        states = states.view(*states.shape[:-1], -1, attention.head_dim).transpose(1, 2)
        if rotary is None:
            return states
        angles = (part.to(states.dtype) for part in rotary)
        return Rotate.apply(states, *angles) if torch.is_grad_enabled() else rotate(states, *angles)

    query, key, value = heads(query, query_rotary), heads(key, key_rotary), heads(value)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    return attend(query, key, value, mask, attention.scaling)


def dropout_of(layer: nn.Module, states: torch.Tensor) -> torch.Tensor | None:
    """What dropout multiplies a branch of the states by, of their shape; None where nothing is dropped."""
    if not layer.training or layer.hidden_dropout == 0:
        return None
    return nn.functional.dropout(torch.ones_like(states), layer.hidden_dropout)


def add_branch(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """residual + gate * branch, [..., hidden]."""
    return residual + branch if gate is None else torch.addcmul(residual, branch, gate)


def add_attention(
    layer: nn.Module,
    residual: torch.Tensor,
    seen: torch.Tensor,
    gate: torch.Tensor | None,
    dropout: torch.Tensor | None,
) -> torch.Tensor:
    """The residual and what the attention saw, both [..., hidden]."""
    projection = layer.self_attn.o_proj
    if torch.is_grad_enabled() and dropout is None and is_constant(gate):
        return GatedLinear.apply(residual, seen, projection.weight, gate)
    branch = apply_linear(projection, seen)
    return add_branch(residual, branch if dropout is None else branch * dropout, gate)


def add_mlp(
    layer: nn.Module, states: torch.Tensor, modulation: Modulation, dropout: torch.Tensor | None
) -> torch.Tensor:
    """states + gate * dropout * MLP(norm(states)), [..., hidden]; `modulation` is shift, scale and gate."""
    norm, up, down = layer.post_attention_layernorm, layer.mlp.up_proj, layer.mlp.down_proj
    shift, scale, gate = modulation
    if torch.is_grad_enabled() and is_constant(shift):
        parameters = (norm.eps, up.weight, up.bias, down.weight, down.bias)
        gate_and_kind = (gate, True) if dropout is None else (None, False)
        branch = MLP.apply(states, *folded_norm(norm, shift, scale), *parameters, *gate_and_kind)
        return branch if dropout is None else add_branch(states, branch * dropout, gate)
    middle = apply_linear(up, modulated_norm(norm, shift, scale, states))
    branch = apply_linear(down, nn.functional.gelu(middle, approximate="tanh"))
    return add_branch(states, branch if dropout is None else branch * dropout, gate)


def wanted_of(
    layer: nn.Module, mask: torch.Tensor | None, modulation: Modulation, cache: Cache | None
) -> WantedQueries | None:
    """The queries that this layer may confine itself to; None means all."""
    attention = layer.self_attn
    is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
    if not is_last or mask is None or cache is not None or has_hooks(layer) or not is_constant(modulation[0]):
        return None
    return wanted_queries(mask)


def last_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    mask: torch.Tensor,
    rotary: Rotary,
    modulation: Modulation,
    wanted: WantedQueries,
) -> torch.Tensor:
    """The layer for the wanted tokens alone [batch, length, hidden]; the others are zero."""

    def picked(states: torch.Tensor) -> torch.Tensor:
        columns = wanted.columns[..., None].expand(-1, -1, states.shape[-1])
        return states.expand(len(columns), -1, -1).gather(1, columns)

    q_proj, *key_value = projections_of(layer)
    key, value = project(layer.input_layernorm, modulation, hidden_states, *key_value)
    states = picked(hidden_states)
    (query,) = project(layer.input_layernorm, modulation, states, q_proj)
    query_rotary = tuple(picked(angles[:, 0])[:, None] for angles in rotary)
    seen = attention_of(layer, query, key, value, wanted.mask, query_rotary, rotary)
    is_wanted = notes_of(mask).wanted
    dropouts = (dropout_of(layer, hidden_states) for _ in range(2))
    first, second = (None if dropout is None else dropout[is_wanted] for dropout in dropouts)
    states = add_attention(layer, states[wanted.is_wanted], seen[wanted.is_wanted], modulation[2], first)
    states = add_mlp(layer, states, modulation[3:], second)
    return torch.zeros_like(hidden_states).index_put((is_wanted,), states)
