"""The log-probability of a completion under a block diffusion model: the bound that its training maximises."""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL
from ..modeling.two_stream_block_diffusion import TextBlocks
from ..noise.sampler import NoiseSampler


class LogProbability(NamedTuple):
    """An estimate of a bound in nats, and its standard error over the noise, both [batch]."""

    value: Tensor
    standard_error: Tensor


def token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    num_samples: int = 1,
    seed: tuple[int, ...] = (0,),
) -> Tensor:
    """
    What each token adds to an estimate of the bound on log p(completion | prompt), in nats, differentiable: [batch,
    length], 0 where nothing is predicted or nothing was masked. The sum over a row has the mean

        - sum over blocks of sum_k 1/k E_{|M| = k} sum over M of -log x_theta(x_i | M masked, earlier blocks)

    The noise of a row is a function of its text and the seed alone. Two models that are given the same seed meet the
    same noise, and so the difference of their estimates varies less than that of independent ones, and is 0 for equal
    models (the antithetic sampling of VRPO; LLaDA 1.5, arXiv 2505.19223). The samples share out the noise levels among
    themselves.

    Args:
        model: the block diffusion model, as it is wrapped.
        input_ids, attention_mask: prompts and completions [batch, length], padded on either side.
        labels: -100 for what is not part of the completion [batch, length].
        num_samples: noised copies of each text, in one forward.
        seed: of the noise.
    """
    config = model.config
    blocks = TextBlocks.of_batch(config, input_ids, labels, attention_mask)
    sampler = NoiseSampler(masking="exact_count", num_copies=num_samples)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    noises = []
    for row, ids in enumerate(input_ids):
        own = slice(row, row + 1)
        text = replace(blocks, block=blocks.block[own], predicted=blocks.predicted[own], shape=(1, blocks.shape[1]))
        number = _number_of_text(ids[real[row] != 0])
        noise = sampler.draw(config, FULL_NOISE_INTERVAL, input_ids[own], text, [number], 1, seed)
        noises.append(noise.inputs(input_ids[own]))
    inputs = {name: torch.cat([noise[name] for noise in noises]) for name in noises[0]}
    inputs["labels"] = labels.masked_fill(~blocks.predicted, -100)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    return -model(**inputs).token_nelbo


@torch.no_grad()
def completion_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    num_draws: int = 16,
    num_samples: int = 1,
    seed: int = 0,
) -> LogProbability:
    """
    The bound on log p of each completion, from independent estimates of [`token_log_probs`]. At block size 1 it is log
    p itself; at others what the bound leaves open comes on top of the standard error.

    Args:
        model, input_ids, labels, attention_mask, num_samples: as there; texts are [batch, length].
        num_draws: estimates.
        seed: of the noise.

    Raises:
        ValueError: fewer than two draws.
    """
    if num_draws < 2:
        raise ValueError(f"`num_draws` must be at least 2 for a standard error, but got {num_draws}.")
    draws = torch.stack(
        [
            token_log_probs(model, input_ids, labels, attention_mask, num_samples, (seed, draw)).double().sum(-1)
            for draw in range(num_draws)
        ]
    )
    return LogProbability(draws.mean(0), draws.std(0) / num_draws**0.5)


def _number_of_text(ids: Tensor) -> int:
    """A number that the ids alone decide, whatever rows stand beside them."""
    return int.from_bytes(hashlib.blake2b(str(ids.tolist()).encode(), digest_size=4).digest(), "big")
