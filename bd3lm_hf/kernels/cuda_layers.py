"""
The published network in few launches, for `generate` on a GPU: there a forward of a few tokens takes as long as its
kernels take to be launched one after the other, whatever they compute.

One product for queries, keys and values; shifts and scales of a constant noise level within the norms; gates within
the sums. What it computes is what the model computes, up to rounding.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention

from .cpu_generation import folded_norm
from .cpu_layers import modulation_of


class FastLayer:
    """A decoder layer at a constant noise level, as tensors."""

    def __init__(self, layer: nn.Module, modulation: tuple[Tensor | None, ...]):
        """`modulation`: shift, scale and gate of the attention, then of the MLP, each [hidden] or None."""
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.eps = layer.input_layernorm.eps
        self.norm = folded_norm(layer.input_layernorm, *modulation[:2])
        self.second_norm = folded_norm(layer.post_attention_layernorm, *modulation[3:5])
        self.gate, self.second_gate = modulation[2], modulation[5]
        self.qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self.o = attention.o_proj.weight
        self.up, self.down = (mlp.up_proj.weight, mlp.up_proj.bias), (mlp.down_proj.weight, mlp.down_proj.bias)

    def made(self) -> list[Tensor]:
        """The tensors that are not the model's own."""
        made = [*self.norm, *self.second_norm, self.gate, self.second_gate, self.qkv]
        return [tensor for tensor in made if tensor is not None]

    def __call__(self, states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        """[batch, length, hidden] -> the same shape, by angles [batch or 1, length, 1, head_dim], halves swapped."""
        size = states.shape[-1:]
        heads = linear(layer_norm(states, size, *self.norm, self.eps), self.qkv)
        num_heads = size[0] // self.head_dim
        heads = heads.view(*heads.shape[:2], 3 * num_heads, self.head_dim)
        query_key, value = heads.split([2 * num_heads, num_heads], dim=2)
        query_key = torch.addcmul(query_key * cos, query_key.roll(self.head_dim // 2, -1), sin)
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        states = gated_sum(states, self.gate, linear(seen.transpose(1, 2).flatten(2), self.o))
        branch = gelu(linear(layer_norm(states, size, *self.second_norm, self.eps), *self.up), approximate="tanh")
        return gated_sum(states, self.second_gate, linear(branch, *self.down))


def gated_sum(residual: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """residual + gate * branch, [batch, length, hidden]."""
    return residual + branch if gate is None else torch.addcmul(residual, gate, branch)


class FastNetwork:
    """What a denoiser calls in place of a model of the published network."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        network = model.base_model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        condition, modulation = network.condition(None, model.device), (None, None)
        self.layers = [FastLayer(layer, modulation_of(layer, condition, self.dtype)) for layer in network.layers]
        if condition is not None:
            modulation = network.adaln_modulation(condition).to(self.dtype).flatten().chunk(2)
        self.norm, self.eps = folded_norm(network.norm, *modulation), network.norm.eps
        self.embeddings, self.head = network.embed_tokens.weight, (model.lm_head.weight, model.lm_head.bias)
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=model.device) / head_dim
        divisors = self.config.rope_theta**exponents
        # With the sign of the half that is turned: it is the first that is subtracted.
        self.divisors = torch.cat([-divisors, divisors])

    def refresh(self, other: "FastNetwork") -> None:
        """Takes over, in place, what was made of the weights as they are now."""
        torch._foreach_copy_(self._made(), other._made())

    def _made(self) -> list[Tensor]:
        made = [tensor for layer in self.layers for tensor in layer.made()]
        return made + [tensor for tensor in self.norm if tensor is not None]

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [batch or 1, length], halves of the latter swapped, [..., 1, head_dim]."""
        angles = position_ids[..., None].float() / self.divisors
        return angles.cos().to(self.dtype)[:, :, None], angles.sin().to(self.dtype)[:, :, None]

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any, cache: Any, logits_to_keep, angles=None
    ) -> Any:
        """
        As the model: an object with the `logits` [batch, kept, vocab] of ids [batch, length]. Without a mask all is
        seen; `angles` are those of the positions, which are computed where they are not given.
        """
        states = embedding(input_ids, self.embeddings)
        cos, sin = self.angles(position_ids) if angles is None else angles
        for layer in self.layers:
            states = layer(states, attention_mask, cos, sin, cache)
        if isinstance(logits_to_keep, int):
            states = states[:, -logits_to_keep:]
        else:
            states = states.gather(1, logits_to_keep[..., None].expand(-1, -1, states.shape[-1]))
        states = layer_norm(states, states.shape[-1:], *self.norm, self.eps)
        return SimpleNamespace(logits=linear(states, *self.head))


def fast_network(model: nn.Module, is_plain_module: Any) -> FastNetwork | None:
    """A [`FastNetwork`] of a model; None where it is another network, or more than plain layers."""
    network, config = model.base_model, model.config
    is_taken = (
        type(network).__name__ == "BD3LMModel"
        and config._attn_implementation == "sdpa"
        and not config.time_conditioning
        and all(map(is_plain_module, model.modules()))
        and not (model.training and config.hidden_dropout > 0)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(model.device.type)
        and type(model.lm_head) is nn.Linear
        # The embedded noise level alone is of another precision.
        and {part.dtype for part in network.layers[0].self_attn.parameters()} == {model.dtype}
        and all(type(part) is nn.Linear for layer in network.layers for part in layer.mlp.children())
        and all(type(part) is nn.Linear for layer in network.layers for part in layer.self_attn.children())
        and len({part.device for part in model.parameters()}) == 1
    )
    return FastNetwork(model) if is_taken else None
