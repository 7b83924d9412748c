"""The mathematics of block diffusion: noise schedules, the forward process q(x_t | x_0), the SUBS rules."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_bd3lm import validate_noise_interval


SCHEDULE_EPSILON = 1e-3
# Reported likelihood takes t from this interval, as the paper's does: below it the weight 1/t has a heavy tail.
FULL_NOISE_INTERVAL = (1e-3, 1.0)


@dataclass(frozen=True)
class NoiseSchedule:
    """
    How likely a token is masked at time t in [0, 1], and the weight that makes the weighted loss a bound.

    With alpha_t the probability that a token is still there at time t in [0, 1] of any shape [...] (arXiv 2503.09573,
    Sec. 3), `mask_probability` is p(t) = 1 - alpha_t, and `weight`, of t and p(t), w(t) = -alpha'_t / (1 - alpha_t).
    """

    mask_probability: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]

    def loss_weight(self, t: Tensor) -> Tensor:
        """w(t), for times `t` in (0, 1] of any shape [...]: weights [...], in 1 / (unit of t)."""
        return self.weight(t, self.mask_probability(t))


HALF_PI = math.pi / 2
# The schedules of arXiv 2503.09573 by the name that `noise_schedule` takes; "loglinear" masks linearly (its Eq. 8).
NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "loglinear": NoiseSchedule(lambda t: t, lambda t, p: 1 / t),
    "square": NoiseSchedule(lambda t: t.pow(2).clamp(min=SCHEDULE_EPSILON), lambda t, p: 2 * t / p),
    "square_root": NoiseSchedule(lambda t: t.sqrt().clamp(min=SCHEDULE_EPSILON), lambda t, p: t.rsqrt() / (2 * p)),
    "log": NoiseSchedule(lambda t: torch.log1p(t) / math.log(2), lambda t, p: 1 / (torch.log1p(t) * (1 + t))),
    "cosine": NoiseSchedule(
        lambda t: 1 - (1 - SCHEDULE_EPSILON) * torch.cos(HALF_PI * t),
        lambda t, p: (1 - SCHEDULE_EPSILON) * HALF_PI * torch.sin(HALF_PI * t) / (p + SCHEDULE_EPSILON),
    ),
}


def sigma_from_mask_probability(mask_probability: Tensor) -> Tensor:
    """sigma = -log(1 - p), the noise level that conditions the network, capped at -log(eps); any shape."""
    return -torch.log1p(-mask_probability).clamp(min=math.log(SCHEDULE_EPSILON))


def generator_of(text: str) -> torch.Generator:
    """A generator seeded by a hash of the text: 32 bits, all that torch's CPU generator reads of a seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_timesteps(
    batch_size: int,
    num_blocks: int,
    noise_interval: tuple[float, float],
    antithetic: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """
    Draws the time t of every block from U[beta, omega] (arXiv 2503.09573, Sec. 5): [batch_size, num_blocks], float32.

    Antithetic draws put one t into each of `batch_size * num_blocks` strata of equal width. The strata are dealt to
    the blocks in random order, so that each block's t is uniform whatever its row and its place in the row.

    Args:
        batch_size, num_blocks: rows, and blocks per row.
        noise_interval: (beta, omega), 0 <= beta <= omega <= 1; anything else raises a ValueError.
        antithetic: stratify the draws; otherwise they are independent.
        generator: where the random numbers come from, of any device; by default torch's global generator.
        device: where t is wanted.
    """
    validate_noise_interval(noise_interval)
    beta, omega = noise_interval
    num_strata = batch_size * num_blocks
    # Drawn where the generator is. Under `torch.compile` the overloads with one take no sizes that vary.
    source = {"device": device} if generator is None else {"device": generator.device, "generator": generator}
    t = torch.rand(num_strata, **source)
    if antithetic:
        t = (torch.randperm(num_strata, **source) + t) / num_strata
    t = (beta + (omega - beta) * t).view(batch_size, num_blocks)
    return t if device is None else t.to(device)


def forward_process(
    x_0: Tensor,
    mask_probability: Tensor,
    mask_token_id: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """
    Draws x_t ~ q(x_t | x_0) [batch, length]: each token becomes the mask token independently with its probability.

    Args:
        x_0: clean ids [batch, length].
        mask_probability: p of each token, broadcastable to [batch, length].
        mask_token_id: id of the mask token.
        maskable: bool [batch, length]; where False the token stays.
        generator: where the random numbers come from, of any device; by default torch's global generator.
        uniform: the random numbers themselves, in [0, 1) [batch, length].
    """
    if uniform is None:
        drawn_on = x_0.device if generator is None else generator.device
        uniform = torch.empty(x_0.shape, device=drawn_on).uniform_(generator=generator).to(x_0.device)
    masked = uniform < mask_probability
    return torch.where(masked if maskable is None else masked & maskable, mask_token_id, x_0)


def subs_log_probs(logits: Tensor, x_t: Tensor, mask_token_id: int) -> Tensor:
    """
    log x_theta under the SUBS rules (arXiv 2406.07524, Sec. 3.2.3), in nats [batch, length, vocab], float32: the mask
    token (`mask_token_id`) has probability 0, and a revealed token stays as it is. `logits` are the raw scores [batch,
    length, vocab] of the noised ids `x_t` [batch, length].
    """
    logits = logits.float()
    is_mask_token = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    log_probs = logits.masked_fill(is_mask_token, -torch.inf).log_softmax(-1)
    stays = torch.full_like(log_probs, -torch.inf).scatter_(-1, x_t[..., None], 0.0)
    return torch.where((x_t == mask_token_id)[..., None], log_probs, stays)
