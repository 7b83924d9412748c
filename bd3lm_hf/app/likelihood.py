"""How likely the model itself finds what it wrote."""

import math
from dataclasses import dataclass
from typing import Any

import torch


# Blocks of up to so many new tokens have so few masks (15) that all of them are read.
MOST_ENUMERATED_TOKENS = 4
# For larger blocks: so many independent draws of the noise.
NUM_DRAWS = 32
# Tokens of a text and of its copies that are read at once; a mask is of all their pairs.
MOST_AT_ONCE = 2048


@dataclass(frozen=True)
class Likelihood:
    """
    The negative evidence lower bound of the new tokens of a text, given the others.

    Attributes:
        nelbo: nats per new token.
        standard_error: how much `nelbo` would vary with other draws of the noise; 0 where none is drawn.
        is_exact: whether every mask was read.
        is_bound: whether -log p itself may be less, as it may wherever a block has several new tokens.
    """

    nelbo: float
    standard_error: float
    is_exact: bool
    is_bound: bool

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nelbo, 700.0))


@torch.no_grad()
def likelihood_of_new_tokens(model: Any, tokens: torch.Tensor, is_new: torch.Tensor) -> Likelihood:
    """
    The NELBO (arXiv 2503.09573, Eq. 8) of the new tokens, given those before their block and the given ones within it.

    With t integrated out, that of a block with m new tokens is `sum_k 1/k E_{|M|=k} sum_{i in M} -log x_theta(x_i)`, M
    uniform among the k-subsets. Up to 4 new tokens per block all 2^m - 1 subsets are read. For more, and for models
    that read t, the loss of evaluation is averaged over draws of the noise, the same ones each time.

    Args:
        tokens: ids of a finished text [length].
        is_new: which of them are scored, bool [length].

    Raises:
        ValueError: there is no new token.
    """
    if model.config.ignore_bos:
        # It is read only, whoever wrote it.
        is_new = is_new & (torch.arange(len(tokens)) > 0)
    if not is_new.any():
        raise ValueError("`is_new` must mark at least one token, but got none.")
    block = torch.arange(len(tokens)) // model.config.block_size
    num_new = torch.zeros(int(block.max()) + 1, dtype=torch.long).scatter_add_(0, block, is_new.long())
    most_new = int(num_new.max())
    text = tokens[None].to(model.device)
    labels = text.masked_fill(~is_new[None].to(model.device), -100)
    is_bound = most_new > 1 or model.config.time_conditioning
    is_exact = most_new <= MOST_ENUMERATED_TOKENS and not model.config.time_conditioning
    if is_exact:
        num_at_once = max(MOST_AT_ONCE // len(tokens) - 1, 1)
        nelbo = 0.0
        for masked, weights in zip(*(part.split(num_at_once) for part in every_mask(block, is_new, num_new))):
            noise = {
                "input_ids": torch.where(masked, model.config.mask_token_id, tokens).flatten()[None],
                "loss_weights": weights.flatten()[None],
            }
            noise = {name: values.to(model.device) for name, values in noise.items()}
            nelbo += model(clean_input_ids=text, labels=labels, **noise).loss.item()
        return Likelihood(nelbo, 0.0, True, is_bound)
    draws = [model(text, labels=labels, noise_seed=seed).loss.double() for seed in range(NUM_DRAWS)]
    draws = torch.stack(draws)
    return Likelihood(draws.mean().item(), draws.std().item() / math.sqrt(NUM_DRAWS), False, is_bound)


def every_mask(block: torch.Tensor, is_new: torch.Tensor, num_new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Copies of a text in which the j-th new token of each block is masked where bit j of the copy's number is set.

    A block of m new tokens is masked in the copies 1 to 2^m - 1 alone. A mask of k tokens weighs 1 / (k binom(m, k)).

    Args:
        block: number of each token's block [length].
        is_new: bool [length].
        num_new: new tokens of each block [blocks].

    Returns:
        Which tokens are masked, bool [copies, length], and what each weighs, float32 of that shape.
    """
    place = is_new.long().cumsum(0) - 1 - (num_new.cumsum(0) - num_new)[block]
    size = num_new[block]
    most_new = int(num_new.max())
    number = torch.arange(1, 2**most_new)[:, None]
    masked = is_new & ((number >> place.clamp(min=0)) % 2 == 1) & (number >> size == 0)
    table = torch.zeros(most_new + 1, most_new + 1)
    for m in range(1, most_new + 1):
        for k in range(1, m + 1):
            table[m, k] = 1 / (k * math.comb(m, k))
    num_masked = sum((number >> bit) % 2 for bit in range(most_new))
    return masked, table[size.expand(masked.shape), num_masked.expand(masked.shape)]
