"""
The equations of block diffusion, once more: dense, in float64, without a cache, and without a line of the package.

Everything here takes a `state_dict` of `BD3LMForMaskedLM` (the names of its parameters are all that it shares with the
package) and any object with the fields of `BD3LMConfig`. Masks are built entry by entry from the definition of the set
of keys that a query may see; nothing is gathered, chunked or skipped.
"""

import itertools
import math

import torch


def real_positions(attention_mask):
    """Position of each token among the real tokens of its row, [B, L]; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0) * attention_mask.long()


def window_in_blocks(config):
    """How many earlier blocks fit beside a block's own into `max_position_embeddings`."""
    return math.ceil(config.max_position_embeddings / config.block_size) - 1


def may_see(kind, blocks, real, documents, window):
    """
    The set definition of who attends to whom, as a mask.

    Args:
        kind: function (query block [.., Q, 1], key block [.., 1, K]) -> bool, the rule on blocks.
        blocks: (query blocks [B, Q], key blocks [B, K]).
        real: keys that are no padding, bool [B, K].
        documents: (query documents [B, Q], key documents [B, K]).
        window: a block sees no more than so many blocks before its own.

    Returns:
        bool [B, Q, K].
    """
    query, key = blocks[0][:, :, None], blocks[1][:, None, :]
    same_document = documents[0][:, :, None] == documents[1][:, None, :]
    return kind(query, key) & (query - key <= window) & same_document & real[:, None, :]


def block_causal_mask(config, positions, real, documents):
    """Query i sees key j iff block(j) <= block(i), bool [B, L, L]."""
    blocks = positions // config.block_size
    window = window_in_blocks(config)
    return may_see(lambda i, j: j <= i, (blocks, blocks), real, (documents, documents), window)


def two_stream_mask(config, positions, real, documents):
    """Mask over `[x_t ; x_0]`, bool [B, 2L, 2L]: the four quarters of section "who attends to whom"."""
    blocks = positions // config.block_size
    window = window_in_blocks(config)

    def quarter(kind):
        return may_see(kind, (blocks, blocks), real, (documents, documents), window)

    noisy_to_noisy = quarter(lambda i, j: i == j)
    noisy_to_clean = quarter(lambda i, j: j < i)
    clean_to_noisy = quarter(lambda i, j: torch.zeros_like(i == j))
    clean_to_clean = quarter(lambda i, j: j <= i)
    return torch.cat(
        [torch.cat([noisy_to_noisy, noisy_to_clean], -1), torch.cat([clean_to_noisy, clean_to_clean], -1)], -2
    )


def layer_norm(x, weight, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """Rotary embedding of x [B, H, T, D] at positions [B, T]: the pairs are (d, d + D/2)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = positions[:, None, :, None].to(x.dtype) * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def attention(q, k, v, mask):
    """Softmax attention over the keys that `mask` [B, Q, K] allows; a query that sees nothing gets zeros."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask[:, None]
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)) @ v


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def noise_condition(state, sigma):
    """Sinusoids of sigma [B, T] (128 cosines, then 128 sines) -> MLP -> SiLU, [B, T, cond_dim]."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)
    angles = sigma[..., None] * frequencies
    x = torch.cat([angles.cos(), angles.sin()], dim=-1)
    x = x @ state["model.noise_embedding.linear_1.weight"].T + state["model.noise_embedding.linear_1.bias"]
    x = silu(x) @ state["model.noise_embedding.linear_2.weight"].T + state["model.noise_embedding.linear_2.bias"]
    return silu(x)


def network(state, config, input_ids, positions, mask, sigma=None):
    """
    Logits [B, T, V] of the transformer on `input_ids` [B, T] at `positions` [B, T] with `mask` [B, T, T].

    `sigma` [B, T] counts only with `config.time_conditioning`; otherwise the noise level is 0 everywhere.
    """
    state = {name: value if value.dtype == torch.float64 else value.double() for name, value in state.items()}
    heads = config.num_attention_heads
    batch, length = input_ids.shape
    if sigma is None or not config.time_conditioning:
        sigma = torch.zeros(batch, length, dtype=torch.float64)
    condition = noise_condition(state, sigma.double()) if config.adaln else None

    def modulation(name, parts):
        if condition is None:
            return [torch.tensor(value, dtype=torch.float64) for value in ([0.0, 0.0, 1.0] * 2)[:parts]]
        return (condition @ state[f"{name}.weight"].T + state[f"{name}.bias"]).chunk(parts, dim=-1)

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = state["model.embed_tokens.weight"][input_ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(f"{layer}.adaln_modulation", 6)
        h = layer_norm(x, state[f"{layer}.input_layernorm.weight"], config.layer_norm_eps) * (1 + scale_a) + shift_a
        q, k, v = (split(h @ state[f"{layer}.self_attn.{name}_proj.weight"].T) for name in "qkv")
        h = attention(rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta), v, mask)
        x = x + gate_a * (h.transpose(1, 2).flatten(2) @ state[f"{layer}.self_attn.o_proj.weight"].T)
        h = layer_norm(x, state[f"{layer}.post_attention_layernorm.weight"], config.layer_norm_eps)
        h = h * (1 + scale_m) + shift_m
        h = gelu_tanh(h @ state[f"{layer}.mlp.up_proj.weight"].T + state[f"{layer}.mlp.up_proj.bias"])
        x = x + gate_m * (h @ state[f"{layer}.mlp.down_proj.weight"].T + state[f"{layer}.mlp.down_proj.bias"])
    shift, scale = modulation("model.adaln_modulation", 2)
    x = layer_norm(x, state["model.norm.weight"], config.layer_norm_eps) * (1 + scale) + shift
    return x @ state["lm_head.weight"].T + state["lm_head.bias"]


def _layout(input_ids, attention_mask, position_ids, document_ids):
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = real_positions(attention_mask) if position_ids is None else position_ids
    documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
    return positions, attention_mask.bool(), documents


def denoising_logits(state, config, input_ids, attention_mask=None, position_ids=None, document_ids=None, sigma=None):
    """Logits [B, L, V] of the block-causal pass; `sigma` [B] or [B, L]."""
    positions, real, documents = _layout(input_ids, attention_mask, position_ids, document_ids)
    mask = block_causal_mask(config, positions, real, documents)
    return network(state, config, input_ids, positions, mask, _per_token(sigma, input_ids))


def two_stream_logits(
    state, config, x_t, x_0, attention_mask=None, position_ids=None, document_ids=None, sigma=None, clean_sigma=None
):
    """Logits [B, L, V] of x_t in the pass over `[x_t ; x_0]`; the clean stream has `sigma` too unless told."""
    positions, real, documents = _layout(x_t, attention_mask, position_ids, document_ids)
    sigma = _per_token(sigma, x_t)
    clean_sigma = sigma if clean_sigma is None else _per_token(clean_sigma, x_t)
    sigma = None if sigma is None else torch.cat([sigma, clean_sigma], -1)
    mask = two_stream_mask(config, positions, real, documents)
    both = network(state, config, torch.cat([x_t, x_0], -1), positions.repeat(1, 2), mask, sigma)
    return both[:, : x_t.shape[1]]


def _per_token(sigma, input_ids):
    if sigma is None:
        return None
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return sigma if sigma.ndim == 2 else sigma[:, None].expand(input_ids.shape)


def subs_log_probs(logits, x_t, mask_token_id):
    """SUBS: the mask token has probability 0, and a revealed token stays what it is; [B, L, V]."""
    other = torch.arange(logits.shape[-1]) != mask_token_id
    log_probs = logits - torch.logsumexp(logits[..., other], dim=-1, keepdim=True)
    log_probs = torch.where(other, log_probs, -torch.inf)
    stays = torch.log(torch.nn.functional.one_hot(x_t, logits.shape[-1]).to(logits.dtype))
    return torch.where((x_t == mask_token_id)[..., None], log_probs, stays)


EPS = 1e-3

# Each schedule as its table row: t -> (mask probability p(t), weight w(t)).
SCHEDULES = {
    "loglinear": lambda t: (t, 1 / t),
    "square": lambda t: (_floor(t**2), 2 * t / _floor(t**2)),
    "square_root": lambda t: (_floor(t**0.5), t**-0.5 / (2 * _floor(t**0.5))),
    "log": lambda t: (torch.log1p(t) / math.log(2), 1 / (torch.log1p(t) * (1 + t))),
    "cosine": lambda t: (
        1 - (1 - EPS) * torch.cos(math.pi * t / 2),
        (1 - EPS) * torch.sin(math.pi * t / 2) * (math.pi / 2) / (1 - (1 - EPS) * torch.cos(math.pi * t / 2) + EPS),
    ),
}


def _floor(p):
    return p.clamp_min(EPS)


def token_losses(logits, x_t, x_0, weight, predicted, mask_token_id):
    """w(t) * -log x_theta(x_0) at the masked predicted positions, 0 elsewhere, [B, L] in nats."""
    log_probs = subs_log_probs(logits, x_t, mask_token_id)
    picked = log_probs.gather(-1, x_0[..., None])[..., 0]
    counts = predicted & (x_t == mask_token_id)
    return torch.where(counts, -weight * picked, torch.zeros_like(picked))


def block_subset_losses(logits_of, x_0, block, mask_token_id):
    """
    The unweighted loss of one block under each of its masks: {subset of positions: sum of CE_i over it, [B]}.

    Args:
        logits_of: function x_t [B, L] -> logits [B, L, V] of the two-stream pass.
        block: positions of the block that may be masked.
    """
    losses = {}
    for size in range(1, len(block) + 1):
        for subset in itertools.combinations(block, size):
            x_t = x_0.clone()
            x_t[:, list(subset)] = mask_token_id
            log_probs = subs_log_probs(logits_of(x_t), x_t, mask_token_id)
            picked = log_probs.gather(-1, x_0[..., None])[..., 0]
            losses[subset] = -picked[:, list(subset)].sum(-1)
    return losses


def rao_blackwell_nelbo(losses, size):
    """sum_k (1/k) E_{|M|=k} [ sum_{i in M} CE_i(M) ], M uniform among the k-subsets of `size` positions; [B]."""
    return sum(loss / (len(subset) * math.comb(size, len(subset))) for subset, loss in losses.items())


def interval_nelbo(losses, size, schedule, noise_interval, points=200_001):
    """E over t ~ U[beta, omega] of w(t) * the expected loss under masks of rate p(t), by quadrature; [B]."""
    beta, omega = noise_interval
    # Midpoints of cells that shrink like u^4 towards t = 0, where some weights are singular.
    edges = beta + (omega - beta) * torch.linspace(0, 1, points, dtype=torch.float64) ** 4
    t, width = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / (omega - beta)
    p, w = SCHEDULES[schedule](t)
    rate = {k: (width * w * p**k * (1 - p) ** (size - k)).sum() for k in range(1, size + 1)}
    return sum(loss * rate[len(subset)] for subset, loss in losses.items())


def first_hitting_distribution(conditionals, start, masked):
    """
    Distribution of what first hitting makes of `start`, by enumeration of the reverse process.

    One uniformly chosen position of `masked` is revealed at a time, its token drawn from the model's conditional.

    Args:
        conditionals: function tuple of ids -> {position: list of the probabilities of its tokens}.
        start: tuple of ids.
        masked: frozenset of the positions to reveal.

    Returns:
        {tuple of ids: probability}.
    """
    if not masked:
        return {start: 1.0}
    outcome = {}
    probabilities = conditionals(start)
    for position in masked:
        for token, probability in enumerate(probabilities[position]):
            if probability == 0:
                continue
            state = start[:position] + (token,) + start[position + 1 :]
            rest = first_hitting_distribution(conditionals, state, masked - {position})
            for final, q in rest.items():
                outcome[final] = outcome.get(final, 0.0) + q * probability / len(masked)
    return outcome


def ancestral_distribution(conditionals, start, masked, levels, remask_cap=0.0):
    """
    Distribution of what the ancestral sampler makes of `start`, by enumeration of what it reveals and masks again.

    Args:
        conditionals: function tuple of ids -> {position: list of the probabilities of its tokens}.
        start: tuple of ids.
        masked: frozenset of the positions to reveal; their id in `start` is the mask token.
        levels: p(t) at each of the times, from 1 down to 0.
        remask_cap: the cap of ReMDM's sigma.

    Returns:
        {tuple of ids: probability}.
    """
    mask_token_id = start[next(iter(masked))]
    states = {start: 1.0}
    for before, after in zip(levels, levels[1:]):
        sigma = min(remask_cap, after / (1 - before)) if before < 1 else 0.0
        reveal = (1 - after - (1 - sigma) * (1 - before)) / before
        following = {}
        for state, probability in states.items():
            known = conditionals(state)
            # Of each position: [(id after the step, probability)].
            choices = []
            for position, token in enumerate(state):
                if position not in masked:
                    choices.append([(token, 1.0)])
                elif token == mask_token_id:
                    revealed = [(new, reveal * p) for new, p in enumerate(known[position])]
                    choices.append([(mask_token_id, 1 - reveal), *revealed])
                else:
                    choices.append([(token, 1 - sigma), (mask_token_id, sigma)])
            for combination in itertools.product(*choices):
                q = math.prod(p for _, p in combination)
                if q > 0:
                    final = tuple(token for token, _ in combination)
                    following[final] = following.get(final, 0.0) + probability * q
        states = following
    return states
