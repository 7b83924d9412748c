"""The training loss by two passes, one over the clean text and one over the noisy blocks: what one pass replaces."""

import torch
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from bd3lm_hf import BD3LMForMaskedLM

from ..dense import normed, rotated


def two_pass_logits(model: BD3LMForMaskedLM, x_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """
    Raw scores of the noisy tokens [batch, length, vocab].

    The first pass keeps the keys and values of the clean text in each layer; the second reads those of earlier blocks
    beside those of its own. The two take the same weights, in the plain formulation of `benchmarks/dense.py`.
    """
    config, length = model.config, x_t.shape[1]
    positions = torch.arange(length, device=x_t.device)
    block = positions // config.block_size
    exponents = torch.arange(0, config.head_dim, 2, device=x_t.device) / config.head_dim
    angles = (positions[:, None] / config.rope_theta**exponents).repeat(1, 2)
    rotary = angles.cos(), angles.sin()

    noise = model.model.noise_embedding
    half = noise.num_features // 2
    features = torch.cat([torch.ones(half), torch.zeros(half)]).to(x_t.device)  # sigma is 0
    condition = silu(noise.linear_2(silu(noise.linear_1(features.expand(len(x_t), 1, -1)))))

    states, cache = model.model.embed_tokens(x_0), []
    for layer in model.model.layers:
        states, keys_values = _layer(layer, states, condition, rotary, block[:, None] >= block)
        cache.append(keys_values)
    states = model.model.embed_tokens(x_t)
    mask = torch.cat([block[:, None] == block, block[:, None] > block], dim=1)
    for layer, clean in zip(model.model.layers, cache, strict=True):
        states, _ = _layer(layer, states, condition, rotary, mask, clean)
    shift, scale = model.model.adaln_modulation(condition).chunk(2, dim=-1)
    return model.lm_head(normed(model.model.norm, states, shift, scale))


def _layer(layer, states, condition, rotary, mask, clean=()):
    """The states after a layer, and its keys and values; `clean` are those of the first pass."""
    attention = layer.self_attn
    modulation = layer.adaln_modulation(condition).chunk(6, dim=-1)

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    states_in = normed(layer.input_layernorm, states, *modulation[:2])
    query, key = (rotated(heads(part(states_in)), *rotary) for part in (attention.q_proj, attention.k_proj))
    value = heads(attention.v_proj(states_in))
    keys, values = (torch.cat(pair, dim=2) for pair in zip((key, value), clean)) if clean else (key, value)
    output = scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
    states = states + modulation[2] * attention.o_proj(output)
    states_in = normed(layer.post_attention_layernorm, states, *modulation[3:5])
    branch = layer.mlp.down_proj(gelu(layer.mlp.up_proj(states_in), approximate="tanh"))
    return states + modulation[5] * branch, (key, value)
