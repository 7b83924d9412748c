"""
The training loss of a BD3-LM in the plain formulation of the paper (arXiv 2503.09573), over the weights of ours.

Both streams go whole through every layer under one dense 2L x 2L mask, shifts, scales and gates are applied per token,
and the probabilities of every position are computed. The matrix products come from outside: by those of the package's
kernels a comparison measures the formulation alone, by torch's own it measures what the published code does. Nothing
else here is the model's: it stays as it is whatever becomes of that.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from bd3lm_hf import BD3LMForMaskedLM, BlockDiffusionForMaskedLM
from bd3lm_hf.modeling.diffusion_block_diffusion import NOISE_SCHEDULES, forward_process, sample_timesteps
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMDecoderLayer


def dense_loss(
    model: BD3LMForMaskedLM | BlockDiffusionForMaskedLM,
    x_0: torch.Tensor,
    linear: Callable = torch.nn.functional.linear,
) -> torch.Tensor:
    """
    The loss in nats per token of a text; every token but the first is predicted.

    Noise is drawn from torch's global generator as the model itself draws it: equal seeds give equal losses.

    Args:
        model: whose weights are taken.
        x_0: ids [batch, length].
        linear: the linear map, as `torch.nn.functional.linear`; a stock network has its own.
    """
    config = model.config
    batch_size, length = x_0.shape
    columns = torch.arange(length, device=x_0.device)
    t = sample_timesteps(
        batch_size, math.ceil(length / config.block_size), config.noise_interval, device=x_0.device
    ).repeat_interleave(config.block_size, dim=1)[:, :length]
    schedule = NOISE_SCHEDULES[config.noise_schedule]
    maskable = (columns > 0).expand(x_0.shape)
    x_t = forward_process(x_0, schedule.mask_probability(t), config.mask_token_id, maskable)
    is_masked = x_t == config.mask_token_id

    is_mask_token = torch.arange(config.vocab_size, device=x_0.device) == config.mask_token_id
    if isinstance(model, BD3LMForMaskedLM):
        logits = two_stream_logits(model, x_t, x_0, linear).float()
    else:
        logits = stock_two_stream_logits(model, x_t, x_0).float()
    log_probs = logits.masked_fill(is_mask_token, -torch.inf).log_softmax(-1)
    # A revealed token is certain, whatever the network says.
    nats = -log_probs.gather(-1, x_0[..., None]).squeeze(-1)
    return (schedule.loss_weight(t) * nats)[is_masked].sum() / maskable.sum()


def two_stream_logits(
    model: BD3LMForMaskedLM, x_t: torch.Tensor, x_0: torch.Tensor, linear: Callable = torch.nn.functional.linear
) -> torch.Tensor:
    """Raw scores of the noisy tokens [batch, length, vocab], after one pass over [x_t ; x_0]."""
    config, length = model.config, x_t.shape[1]
    positions = torch.arange(length, device=x_t.device)
    mask = two_stream_mask(positions // config.block_size)
    states = model.model.embed_tokens(torch.cat([x_t, x_0], dim=1))
    # Added to the scores: SDPA would make this of the boolean mask in each layer, and keep it there.
    device_type = states.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else states.dtype
    mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    exponents = torch.arange(0, config.head_dim, 2, device=x_t.device) / config.head_dim
    angles = (positions[:, None] / config.rope_theta**exponents).repeat(2, 2)
    rotary = angles.cos(), angles.sin()

    noise = model.model.noise_embedding
    half = noise.num_features // 2
    features = torch.cat([torch.ones(half, device=x_t.device), torch.zeros(half, device=x_t.device)])  # sigma is 0
    hidden = silu(linear(features.expand(x_t.shape[0], 1, -1), noise.linear_1.weight, noise.linear_1.bias))
    condition = silu(linear(hidden, noise.linear_2.weight, noise.linear_2.bias))

    def project(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        return linear(states, module.weight, module.bias)

    for layer in model.model.layers:
        states = dense_layer(layer, states, condition, rotary, mask, project)
    shift, scale = project(model.model.adaln_modulation, condition).chunk(2, dim=-1)
    return project(model.lm_head, normed(model.model.norm, states[:, :length], shift, scale))


def stock_two_stream_logits(model: BlockDiffusionForMaskedLM, x_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """
    The same of a stock network, which is given the mask and the positions; predictions are read without a shift, as
    the paper's network has it.
    """
    length = x_t.shape[1]
    positions = torch.arange(length, device=x_t.device)
    states = model.base_model(
        input_ids=torch.cat([x_t, x_0], dim=1),
        attention_mask=two_stream_mask(positions // model.config.block_size)[None, None],
        position_ids=positions.repeat(2)[None],
        use_cache=False,
    ).last_hidden_state
    return model.get_output_embeddings()(states[:, :length])


def two_stream_mask(block: torch.Tensor) -> torch.Tensor:
    """Who sees whom in [x_t ; x_0], from the blocks of the text's tokens [length]: bool [2 length, 2 length]."""
    query, key = block[:, None], block
    noisy_rows = torch.cat([query == key, query > key], dim=1)
    clean_rows = torch.cat([torch.zeros_like(query == key), query >= key], dim=1)
    return torch.cat([noisy_rows, clean_rows])


def dense_layer(layer: BD3LMDecoderLayer, states, condition, rotary, mask, project) -> torch.Tensor:
    """One layer over all tokens of both streams [batch, 2 length, hidden]."""
    attention = layer.self_attn
    modulation = project(layer.adaln_modulation, condition).chunk(6, dim=-1)

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    states_in = normed(layer.input_layernorm, states, *modulation[:2])
    query, key = (rotated(heads(project(part, states_in)), *rotary) for part in (attention.q_proj, attention.k_proj))
    value = heads(project(attention.v_proj, states_in))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    states = states + modulation[2] * project(attention.o_proj, output)
    states_in = normed(layer.post_attention_layernorm, states, *modulation[3:5])
    branch = project(layer.mlp.down_proj, gelu(project(layer.mlp.up_proj, states_in), approximate="tanh"))
    return states + modulation[5] * branch


def normed(norm: torch.nn.Module, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm, then the modulation of each token."""
    return layer_norm(states, norm.weight.shape, norm.weight, None, norm.eps) * (1 + scale) + shift


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [batch, heads, length, head_dim] turned to their positions, halves paired."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
