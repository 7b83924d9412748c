"""The layers of the network: layer norm, noise embedding, rotary positions, attention, MLP."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_bd3lm import ChunkedPattern, DensePattern, select_tokens
from .configuration_bd3lm import BD3LMConfig
from .linear_bd3lm import BD3LMLinear, GatedLinear, GatedMLP, NormedLinear


class FoldedNorm(NamedTuple):
    """Weight and bias [hidden] of a layer norm that holds its shift and scale already, and stands in their place."""

    weight: torch.Tensor
    bias: torch.Tensor


# Shifts, scales and gates: one for all tokens [hidden], of each row or token [batch, 1 or length, hidden], or none.
Modulation = tuple[torch.Tensor | FoldedNorm | None, ...]


def modulation_parts(projection: nn.Module, condition: torch.Tensor, num_parts: int) -> Modulation:
    """Projects a condition [*, cond_dim] to so many vectors [*, hidden]; an adapter may return one with more axes."""
    return projection(condition).view(*condition.shape[:-1], -1).chunk(num_parts, dim=-1)


def select_modulation(modulation: Modulation, selection: torch.Tensor | slice | None) -> Modulation:
    """The modulation of the selected tokens."""
    return tuple(
        part
        if part is None or isinstance(part, FoldedNorm) or part.dim() == 1 or part.shape[1] == 1
        else select_tokens(part, selection)
        for part in modulation
    )


class BD3LMLayerNorm(nn.Module):
    """Layer norm with a weight and no bias, followed by `x * (1 + scale) + shift`."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        size = self.weight.shape
        if isinstance(shift, FoldedNorm):
            return nn.functional.layer_norm(hidden_states, size, shift.weight, shift.bias, self.eps)
        if shift is None or shift.dim() == 1:
            return nn.functional.layer_norm(
                hidden_states, size, *self.affine_map(hidden_states, shift, scale), self.eps
            )
        return nn.functional.layer_norm(hidden_states, size, self.weight, None, self.eps) * (1 + scale) + shift

    def affine_map(
        self, hidden_states: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of an affine layer norm: one modulation for all tokens is nothing to be paid per token."""
        if shift is None:
            return self.weight, None
        return (self.weight * (1 + scale)).to(hidden_states.dtype), shift.to(hidden_states.dtype)


def folded(norm: nn.Module, modulation: Modulation) -> Modulation:
    """A modulation for all tokens whose first two parts are the norm's shift and scale, with these folded into it."""
    shift, scale, *others = modulation
    is_plain = type(norm) is BD3LMLayerNorm and "forward" not in vars(norm)
    if shift is None or not is_plain or shift.device != norm.weight.device:
        # Nothing to fold, a norm that something wraps, or a weight that is offloaded until its layer runs.
        return modulation
    return (FoldedNorm(*norm.affine_map(norm.weight, shift, scale)), None, *others)


def is_wrapped(module: nn.Module) -> bool:
    """Whether calling a module runs more than the `forward` of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def can_be_fused(*modules: nn.Module, constants: Modulation) -> bool:
    """
    Whether these modules are trained, all there is to calling them is in their weights, and these shifts, scales and
    gates are alike for all tokens: then a larger function may compute them, and keep less for the gradients.

    Wrapped, quantized, offloaded, parametrized, sharded and hooked modules are to be called, and a compiler decides
    for itself what to keep.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(part is None or part.dim() == 1 for part in constants)
        and all(
            type(module) in (BD3LMLayerNorm, BD3LMLinear)
            and not is_wrapped(module)
            and type(module.weight) in (nn.Parameter, torch.Tensor)
            and module.weight.requires_grad
            for module in modules
        )
    )


def project_normed(
    norm: BD3LMLayerNorm, modulation: Modulation, hidden_states: torch.Tensor, *projections: nn.Module
) -> tuple[torch.Tensor, ...]:
    """Each projection of the layer norm of the states [..., hidden]; `modulation` is its shift and scale."""
    if can_be_fused(norm, *projections, constants=modulation):
        parameters = [parameter for module in projections for parameter in (module.weight, module.bias)]
        norm_parameters = norm.affine_map(hidden_states, *modulation)
        return NormedLinear.apply(hidden_states, *norm_parameters, norm.eps, *parameters)
    normed = norm(hidden_states, *modulation)
    return tuple(projection(normed) for projection in projections)


def add_branch(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """residual + gate * branch [batch, length, hidden]; the gate is [hidden], per row or token, or None."""
    return residual + branch if gate is None else torch.addcmul(residual, branch, gate)


class BD3LMNoiseEmbedding(nn.Module):
    """Embeds the noise level sigma: 256 sinusoidal features (cosines, then sines), then an MLP with SiLU between."""

    num_features = 256
    max_period = 10000

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.linear_1 = BD3LMLinear(self.num_features, config.cond_dim)
        self.linear_2 = BD3LMLinear(config.cond_dim, config.cond_dim)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        """sigma of any shape -> [*shape, cond_dim]."""
        half = self.num_features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma[..., None].float() * torch.exp(-math.log(self.max_period) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(features))).view(*sigma.shape, -1)


def zero_linear(in_features: int, out_features: int) -> BD3LMLinear:
    """A projection that starts at zero: every branch closed, every token equally likely, as in the published code."""
    linear = BD3LMLinear(in_features, out_features)
    linear.starts_at_zero = True
    return linear


def rotary_embedding(config: BD3LMConfig, position_ids: torch.Tensor, dtype: torch.dtype):
    """
    Cosines and sines of the rotary embedding (arXiv 2104.09864), halves paired as in GPT-NeoX.

    Args:
        position_ids: [batch, length].

    Returns:
        (cos, sin), each [batch, 1, length, head_dim].
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    angles = position_ids[..., None].float() / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys [batch, heads, length, head_dim] to their positions, writing one tensor."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


class Rotate(torch.autograd.Function):
    """[`rotate`], whose gradient is rotated back."""

    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [batch, heads, length, head_dim] at their positions."""
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return Rotate.apply(states, cos, sin) if torch.is_grad_enabled() else rotate(states, cos, sin)


class BD3LMAttention(nn.Module):
    """Multi-head attention with rotary positions; who sees whom is the pattern's business."""

    def __init__(self, config: BD3LMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_dropout = config.hidden_dropout
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        size = config.hidden_size
        self.q_proj = BD3LMLinear(size, size, bias=False)
        self.k_proj = BD3LMLinear(size, size, bias=False)
        self.v_proj = BD3LMLinear(size, size, bias=False)
        self.o_proj = BD3LMLinear(size, size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        norm: BD3LMLayerNorm,
        modulation: Modulation,
        pattern: DensePattern | ChunkedPattern,
        rotary: tuple[torch.Tensor, torch.Tensor],
        selection: torch.Tensor | slice | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: what is seen [batch, length, hidden].
            norm: the layer norm before.
            modulation: shift, scale and gate.
            selection: the tokens that see.

        Returns:
            (hidden_states of the selection with what they saw [batch, selected, hidden], the attention's weights).
        """

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

        shift_and_scale, gate = modulation[:2], modulation[2]
        if selection is None:
            query_rotary = rotary
            query, key, value = project_normed(
                norm, shift_and_scale, hidden_states, self.q_proj, self.k_proj, self.v_proj
            )
        else:
            key, value = project_normed(norm, shift_and_scale, hidden_states, self.k_proj, self.v_proj)
            hidden_states = select_tokens(hidden_states, selection)
            *shift_and_scale, gate = select_modulation(modulation, selection)
            query_rotary = tuple(select_tokens(angles[:, 0], selection)[:, None] for angles in rotary)
            (query,) = project_normed(norm, shift_and_scale, hidden_states, self.q_proj)
        query, key = apply_rotary(heads(query), *query_rotary), apply_rotary(heads(key), *rotary)
        value = heads(value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = pattern(self, query, key, value, **kwargs)
        output = output.flatten(-2)
        drops = self.training and self.hidden_dropout > 0
        if gate is not None and not drops and can_be_fused(self.o_proj, constants=(gate,)):
            return GatedLinear.apply(hidden_states, output, self.o_proj.weight, self.o_proj.bias, gate), weights
        branch = nn.functional.dropout(self.o_proj(output), self.hidden_dropout, self.training)
        return add_branch(hidden_states, branch, gate), weights


class BD3LMMLP(nn.Module):
    """Two projections with tanh-approximated GELU between."""

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.up_proj = BD3LMLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = BD3LMLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, norm: BD3LMLayerNorm, modulation: Modulation) -> torch.Tensor:
        """hidden_states [batch, length, hidden]; the layer norm before, and its shift and scale and the gate."""
        *shift_and_scale, gate = modulation
        up, down = self.up_proj, self.down_proj
        drops = self.training and self.hidden_dropout > 0
        if gate is not None and not drops and can_be_fused(norm, up, down, constants=modulation):
            norm_parameters = norm.affine_map(hidden_states, *shift_and_scale)
            parameters = (up.weight, up.bias, down.weight, down.bias, gate)
            return GatedMLP.apply(hidden_states, *norm_parameters, norm.eps, *parameters)
        branch = down(nn.functional.gelu(up(norm(hidden_states, *shift_and_scale)), approximate="tanh"))
        return add_branch(hidden_states, nn.functional.dropout(branch, self.hidden_dropout, self.training), gate)


class BD3LMDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a layer norm and gated by the noise level (arXiv 2212.09748, adaLN-Zero)."""

    # What computes the same in its place, while `packed_bd3lm.py` lends it.
    packed: Any | None = None

    def __init__(self, config: BD3LMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = BD3LMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = BD3LMAttention(config, layer_idx)
        self.post_attention_layernorm = BD3LMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = BD3LMMLP(config)
        if config.adaln:
            self.adaln_modulation = zero_linear(config.cond_dim, 6 * config.hidden_size)

    def modulation(self, condition: torch.Tensor | None) -> Modulation:
        """Shift, scale and gate of the attention, then of the MLP, from the embedded noise level."""
        return modulation_parts(self.adaln_modulation, condition, 6) if condition is not None else (None,) * 6

    def forward(
        self,
        hidden_states: torch.Tensor,
        pattern: DensePattern | ChunkedPattern,
        rotary: tuple[torch.Tensor, torch.Tensor],
        condition: torch.Tensor | None = None,
        modulation: Modulation | None = None,
        selection: torch.Tensor | slice | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [batch, length, hidden].
            pattern: the attention of this layer.
            rotary: cosines and sines of the positions.
            condition: embedded noise level [cond_dim], or [batch, 1 or length, cond_dim].
            modulation: what `modulation(condition)` would return, where that is known already.
            selection: the tokens whose states are wanted, in the last layer; it computes no other queries.

        Returns:
            [batch, selected, hidden].
        """
        # Another thread may take back what it lent.
        packed = self.packed
        if packed is not None and packed.takes(hidden_states, modulation, pattern):
            return packed(hidden_states, pattern, rotary, selection, past_key_values, **kwargs)
        if modulation is None:
            modulation = self.modulation(condition)
        hidden_states, _ = self.self_attn(
            hidden_states, self.input_layernorm, modulation[:3], pattern, rotary, selection, past_key_values, **kwargs
        )
        return self.mlp(hidden_states, self.post_attention_layernorm, select_modulation(modulation[3:], selection))
