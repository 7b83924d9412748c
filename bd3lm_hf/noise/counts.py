"""The law of the number of masked tokens in a block, and what each number weighs in the loss."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..modeling.diffusion_block_diffusion import NOISE_SCHEDULES


def binomial_probabilities(num_trials: int, p: torch.Tensor) -> torch.Tensor:
    """Binomial(k; num_trials, p) for k = 0..num_trials: p [...] -> [..., num_trials + 1], float64."""
    k, p = torch.arange(num_trials + 1, dtype=torch.float64), p.double()[..., None]
    log_choose = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(num_trials - k + 1)
    return (log_choose + torch.xlogy(k, p) + torch.special.xlog1py(num_trials - k, -p)).exp()


@dataclass(frozen=True)
class MaskedCountLaw:
    """
    How many of the m tokens of a block are masked under t ~ U[beta, omega], and what each number weighs in the loss.

    Given their number k, the masked tokens M are a uniform subset whatever t was, so that the loss of a block (arXiv
    2503.09573, Eq. 8) has the mean sum_k E_t[w(t) Binomial(k; m, p(t))] E_{|M| = k}[sum of -log x_theta], and the mean
    square sum_k E_t[w(t)^2 Binomial(k; m, p(t))] E_{|M| = k}[(sum of -log x_theta)^2].

    Attributes:
        probability: E_t[Binomial(k; m, p(t))], for k = 0..m.
        weight: E_t[w(t) Binomial(k; m, p(t))]; 1 / k on the whole interval from 0 to 1.
        squared_weight: E_t[w(t)^2 Binomial(k; m, p(t))].
    """

    probability: np.ndarray
    weight: np.ndarray
    squared_weight: np.ndarray

    @property
    def positive_probability(self) -> np.ndarray:
        """The law of k given k >= 1, for k = 0..m."""
        positive = np.concatenate([[0.0], self.probability[1:]])
        return positive / positive.sum()

    @property
    def exact_count_weight(self) -> np.ndarray:
        """The weight of a copy with k masked tokens, where k is drawn from `positive_probability`."""
        return _where_drawn(self.weight, self.positive_probability)

    @property
    def complementary_weight(self) -> np.ndarray:
        """
        The weight of each of two complementary copies, by the balance heuristic: of two copies, k tokens are masked in
        P(k) + P(m - k) on average.
        """
        return _where_drawn(self.weight, self.probability + self.probability[::-1])


def _where_drawn(weight: np.ndarray, probability: np.ndarray) -> np.ndarray:
    return np.divide(weight, probability, out=np.zeros_like(weight), where=probability > 0)


@lru_cache(maxsize=4096)
def masked_count_law(num_tokens: int, noise_schedule: str, noise_interval: tuple[float, float]) -> MaskedCountLaw:
    """The [`MaskedCountLaw`] of a block of `num_tokens` tokens that may be masked, by Gauss-Legendre quadrature."""
    beta, omega = noise_interval
    # The peak of the binomial law narrows with the number of tokens.
    nodes, weights = _legendre_nodes(128 if num_tokens <= 64 else 1024)
    u = (nodes + 1) / 2
    # Nodes crowd towards beta, where at beta = 0 some schedules' weights are singular.
    t, weights = beta + (omega - beta) * u**4, 2 * u**3 * weights
    schedule = NOISE_SCHEDULES[noise_schedule]
    probabilities = binomial_probabilities(num_tokens, schedule.mask_probability(t))
    loss_weight = schedule.loss_weight(t)[:, None]
    # Without a masked token the weight, which may be infinite, does not count.
    weighted = torch.where(torch.arange(num_tokens + 1) > 0, loss_weight, 0.0)
    moments = [weights @ (probabilities * weighted**power) for power in (1, 2)]
    return MaskedCountLaw((weights @ probabilities).numpy(), *(moment.numpy() for moment in moments))


@lru_cache
def _legendre_nodes(num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(num_nodes))
