"""How much the training loss varies with its noise: of each interval of t, from one pass, and of the gradients."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from .collators import BD3LMDataCollator
from .modeling.configuration_bd3lm import BD3LMConfig, validate_noise_interval
from .modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL, NOISE_SCHEDULES
from .modeling.two_stream_block_diffusion import TextBlocks
from .noise import Noise, NoiseSampler, masked_count_law


# The grid of arXiv 2503.09573, Sec. 5.3: intervals of these widths, a start every 0.05, and the whole.
INTERVAL_WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
INTERVAL_STEP = 0.05


def noise_interval_grid() -> list[tuple[float, float]]:
    """The intervals (beta, omega) that the search chooses among; each starts at 1e-3 or later, as evaluation does."""
    lowest, highest = FULL_NOISE_INTERVAL
    grid = [FULL_NOISE_INTERVAL]
    for width in INTERVAL_WIDTHS:
        for step in range(round((1 - width) / INTERVAL_STEP) + 1):
            beta = round(step * INTERVAL_STEP, 2)
            grid.append((max(beta, lowest), min(round(beta + width, 2), highest)))
    return grid


@dataclass(frozen=True, eq=False)
class Estimate:
    """
    A figure and the standard error of it; differences and ratios of two of them over the same sequences or batches are
    paired, so that what both have in common does not count.

    Attributes:
        value: the figure.
        influence: how much each independent sequence, or batch, moves it (the infinitesimal jackknife): its
            derivative with respect to their relative weight, divided by their number.
    """

    value: float
    influence: np.ndarray

    @property
    def standard_error(self) -> float:
        """From the spread of the influences; NaN where there is but one sequence."""
        number = len(self.influence)
        return float(np.sqrt(number / (number - 1) * (self.influence**2).sum())) if number > 1 else float("nan")

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.influence - other.influence)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        ratio = self.value / other.value
        return Estimate(ratio, (self.influence - ratio * other.influence) / other.value)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass
class BlockLosses:
    """
    The unweighted losses of blocks under noise from the full interval, from which the loss under any other follows.

    Where the model does not read t, the loss of a block depends on t by the number of its masked tokens alone, so they
    are drawn by exact count, and every interval has a say in every block. Otherwise an interval's blocks are those
    whose t lies in it.

    Attributes:
        t: time of each block [blocks], NaN where the number of masked tokens was drawn in its place.
        num_masked: masked tokens of each block.
        num_tokens: tokens of each block that might have been.
        loss: sum of -log x_theta over the masked tokens of each block, in nats.
        sequence: number of the sequence that each block is part of.
        noise_schedule: that of the model.
    """

    t: np.ndarray
    num_masked: np.ndarray
    num_tokens: np.ndarray
    loss: np.ndarray
    sequence: np.ndarray
    noise_schedule: str

    @staticmethod
    def noise_sampler(config: BD3LMConfig) -> NoiseSampler:
        """What draws the noise of the pass."""
        return NoiseSampler(masking="bernoulli" if config.time_conditioning else "exact_count")

    @classmethod
    def of_sequences(
        cls,
        model,
        sequences: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
        num_draws: int = 1,
        seed: int = 0,
        progress: bool = True,
    ) -> "BlockLosses":
        """One pass over `sequences`, or `num_draws`; the arguments are those of [`nelbo_variance`]."""
        columns = score_blocks(
            model,
            sequences,
            FULL_NOISE_INTERVAL,
            cls.noise_sampler(model.config),
            weighted=False,
            batch_size=batch_size,
            num_draws=num_draws,
            seed=seed,
            progress=progress,
        )
        return cls(**columns, noise_schedule=model.config.noise_schedule)

    def nelbo(self) -> Estimate:
        """
        The bound of the corpus on the full interval, in nats per token; its standard error is over sequences.
        """
        loss_per_token, _ = self._moments(FULL_NOISE_INTERVAL, "bernoulli")
        mean = np.average(loss_per_token, weights=self.num_tokens)
        influence = (loss_per_token - mean) * self.num_tokens / self.num_tokens.sum()
        return Estimate(float(mean), sum_per_sequence(influence, self.sequence))

    def variance(self, noise_interval: tuple[float, float], masking: str = "bernoulli") -> Estimate:
        """
        Variance of a block's NELBO estimate under training with this interval, over blocks, t and masks.

        In (nats per token)^2. The standard error is over sequences, whose blocks are not independent. Under Bernoulli
        masking from t = 0 on the variance is infinite, which no finite number of draws shows.
        """
        return _variance(*self._moments(noise_interval, masking), self.sequence)

    def least_variance_interval(
        self, masking: str = "bernoulli"
    ) -> tuple[tuple[float, float], dict[tuple[float, float], Estimate]]:
        """The interval of the grid whose NELBO varies least, and the variance of each (Sec. 5.3 of the paper)."""
        variances = {interval: self.variance(interval, masking) for interval in noise_interval_grid()}
        return min(variances, key=lambda interval: variances[interval].value), variances

    def _moments(self, noise_interval: tuple[float, float], masking: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each block, estimates of the mean and the mean square of its loss per token under training."""
        loss = self.loss / self.num_tokens
        weights_of = self._count_weights if np.isnan(self.t).any() else self._time_weights
        weight, squared_weight = weights_of(noise_interval, masking)
        return weight * loss, squared_weight * loss**2

    def _count_weights(self, noise_interval: tuple[float, float], masking: str) -> tuple[np.ndarray, np.ndarray]:
        """What each loss, and its square, stands for under another interval; by its number of masked tokens."""
        weight, squared_weight = np.zeros_like(self.loss), np.zeros_like(self.loss)
        for num_tokens in np.unique(self.num_tokens):
            drawn = masked_count_law(int(num_tokens), self.noise_schedule, FULL_NOISE_INTERVAL).positive_probability
            law = masked_count_law(int(num_tokens), self.noise_schedule, tuple(noise_interval))
            chosen = self.num_tokens == num_tokens
            count = self.num_masked[chosen]
            weight[chosen] = law.weight[count] / drawn[count]
            square = law.squared_weight if masking == "bernoulli" else law.weight * law.exact_count_weight
            squared_weight[chosen] = square[count] / drawn[count]
        return weight, squared_weight

    def _time_weights(self, noise_interval: tuple[float, float], masking: str) -> tuple[np.ndarray, np.ndarray]:
        """The same by its t: those outside the interval stand for nothing; NaN for an interval of a single t."""
        beta, omega = noise_interval
        schedule, t = NOISE_SCHEDULES[self.noise_schedule], torch.from_numpy(self.t)
        share = (omega - beta) / (FULL_NOISE_INTERVAL[1] - FULL_NOISE_INTERVAL[0])
        importance = np.where((self.t >= beta) & (self.t <= omega), 1 / share, 0.0) if share else np.nan
        weight = schedule.loss_weight(t).numpy()
        squared_weight = weight**2
        if masking == "exact_count":
            # Given t, a loss that is weighted by the probability of any masked token, where it was weighted by 1.
            squared_weight = squared_weight * (1 - (1 - schedule.mask_probability(t).numpy()) ** self.num_tokens)
        return importance * weight, importance * squared_weight


def sum_per_block(values: torch.Tensor, blocks: TextBlocks) -> torch.Tensor:
    """[batch, length] -> [batch, blocks], float32."""
    num_blocks = int(blocks.block.max()) + 1
    sums = torch.zeros(len(values), num_blocks, device=values.device)
    return sums.scatter_add_(1, blocks.block, values.float())


def nelbo_variance(
    model,
    sequences: Sequence[Sequence[int]],
    noise_interval: tuple[float, float],
    *,
    masking: str = "bernoulli",
    batch_size: int = 8,
    num_draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """
    What [`BlockLosses.variance`] estimates from one pass for all intervals, by drawing under this very one.

    Args:
        model: A `BD3LMForMaskedLM`; its mode is left as it was, and evaluation mode counts.
        sequences: Token ids, one row per sequence, of any lengths.
        noise_interval: (beta, omega) that t is drawn from.
        masking: "bernoulli" or "exact_count".
        batch_size: Sequences per forward pass; the draws do not depend on it.
        num_draws: Passes over all sequences.
        seed: Seed of the noise.
        progress: Show a progress bar.

    Returns:
        The variance of a block's loss per token over blocks, t and masks, in (nats per token)^2, with its standard
        error over sequences.

    Raises:
        ValueError: no interval within [0, 1], an unknown `masking`.
    """
    columns = score_blocks(
        model,
        sequences,
        noise_interval,
        # Sequences that share their strata would not be independent.
        NoiseSampler(antithetic=False, masking=masking),
        weighted=True,
        batch_size=batch_size,
        num_draws=num_draws,
        seed=seed,
        progress=progress,
    )
    loss = columns["loss"] / columns["num_tokens"]
    return _variance(loss, loss**2, columns["sequence"])


def gradient_variance(
    model,
    batches: Iterable[dict[str, torch.Tensor]],
    noise_interval: tuple[float, float] | None = None,
    *,
    noise_sampler: NoiseSampler | None = None,
    num_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """
    Variance of the gradient of the training loss, summed over all parameters (arXiv 2503.09573, Sec. 5.1).

    M / (M - 1) times the mean squared distance of the gradients of M batches from their mean, as the paper estimates
    it: over texts, t and masks. One batch M times gives the share of the noise. The same batches and seed under
    another interval or sampler give a figure whose difference from this one, or ratio to it, is paired.

    The batches are gone through twice, for the mean and for the distances, so that no more than two gradients are held
    at once. Dropout is off. The model's mode, its `grad`s and the random state are left as they were.

    Standard error: to first order a batch moves the estimate by the excess of its own squared distance, divided by M,
    for the mean gradient minimizes the mean squared distance. Hence it is that of the mean of the squared distances.

    Args:
        model: A `BD3LMForMaskedLM`.
        batches: Batches as a collator makes them, iterable twice; `labels` are the `input_ids` where none are given.
        noise_interval: (beta, omega) that t is drawn from; by default that of the model's configuration.
        noise_sampler: How noise is drawn; by default `NoiseSampler()`, one Bernoulli-masked copy.
        num_batches: Take so many of the batches only.
        seed: Seed of the noise.
        progress: Show a progress bar.

    Returns:
        In (nats per token)^2 per (unit of the parameters)^2, with its standard error over batches.

    Raises:
        ValueError: fewer than two batches, batches that can't be gone through twice, no interval within [0, 1], what
            `NoiseSampler.validate` refuses.
    """
    if isinstance(batches, Iterator):
        raise ValueError(f"`batches` must be iterable twice, like a list, but got a {type(batches).__name__}.")
    config = model.config
    noise_interval = config.noise_interval if noise_interval is None else noise_interval
    validate_noise_interval(noise_interval)
    noise_sampler = NoiseSampler() if noise_sampler is None else noise_sampler
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(description: str) -> Iterator[list[torch.Tensor]]:
        for number, batch in enumerate(tqdm(islice(batches, num_batches), description, disable=not progress)):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            inputs = {"labels": batch["input_ids"], **batch}
            noise, _ = _draw_noise(noise_sampler, config, noise_interval, inputs, seed=(seed, number))
            loss = model(**{**inputs, **noise.inputs(inputs["input_ids"])}).loss
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    with evaluation_mode(model), torch.enable_grad():
        total = 0
        mean = [torch.zeros_like(parameter) for parameter in parameters]
        for total, gradient in enumerate(gradients("Mean gradient"), start=1):
            torch._foreach_lerp_(mean, gradient, 1 / total)
        if total < 2:
            raise ValueError(f"`batches` must be at least two, but got {total}.")
        distances = []
        for gradient in gradients("Distances from it"):
            torch._foreach_sub_(gradient, mean)
            distances.append(sum(float(part.double().square().sum()) for part in gradient))
    squared_distances = np.array(distances) * total / (total - 1)
    value = squared_distances.mean()
    return Estimate(float(value), (squared_distances - value) / total)


@torch.no_grad()
def score_blocks(
    model,
    sequences: Sequence[Sequence[int]],
    noise_interval: tuple[float, float],
    noise_sampler: NoiseSampler,
    *,
    weighted: bool,
    batch_size: int,
    num_draws: int,
    seed: int,
    progress: bool,
) -> dict[str, np.ndarray]:
    """The columns of `BlockLosses` but the schedule, of all blocks that hold a predicted token and all draws."""
    validate_noise_interval(noise_interval)
    config = model.config
    collate = BD3LMDataCollator(config.pad_token_id or 0, config.ignore_bos)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("t", "num_masked", "num_tokens", "loss", "sequence")}
    total = num_draws * len(sequences)
    with evaluation_mode(model), tqdm(total=total, unit=" sequences", disable=not progress) as bar:
        for draw in range(num_draws):
            for start in range(0, len(sequences), batch_size):
                batch = collate([{"input_ids": ids} for ids in sequences[start : start + batch_size]])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                x_0, num_rows = batch["input_ids"], len(sequences)
                noise, blocks = _draw_noise(
                    noise_sampler, config, noise_interval, batch, seed=(seed, draw), first_row=start, num_rows=num_rows
                )
                if not weighted:
                    noise.loss_weights = torch.ones_like(noise.loss_weights)
                nelbo = model(**{**batch, **noise.inputs(x_0)}).nelbo
                masked = (noise.x_t != x_0) & blocks.predicted
                sums = [sum_per_block(values, blocks).cpu().numpy() for values in (masked, blocks.predicted, nelbo)]
                counts = sums[1] > 0
                sequence = start + np.arange(len(counts))[:, None].repeat(counts.shape[1], axis=1)
                columns = [noise.t[:, 0].cpu().numpy(), *sums, sequence]
                for part, column in zip(parts.values(), columns, strict=True):
                    part.append(column[counts].astype(np.float64))
                bar.update(len(x_0))
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    integers = {name: columns[name].astype(int) for name in ("num_masked", "num_tokens", "sequence")}
    return {**columns, **integers}


def _draw_noise(
    noise_sampler: NoiseSampler,
    config: BD3LMConfig,
    noise_interval: tuple[float, float],
    inputs: dict[str, torch.Tensor],
    seed: tuple[int, ...],
    first_row: int = 0,
    num_rows: int | None = None,
) -> tuple[Noise, TextBlocks]:
    """The noise of a batch, which is whole by default."""
    x_0 = inputs["input_ids"]
    blocks = TextBlocks.of_batch(config, **inputs)
    rows = range(first_row, first_row + len(x_0))
    noise = noise_sampler.draw(config, noise_interval, x_0, blocks, rows, num_rows or len(x_0), seed)
    return noise, blocks


@contextlib.contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """The model without dropout, and left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _variance(first: np.ndarray, second: np.ndarray, sequence: np.ndarray) -> Estimate:
    """The variance of a block's loss, from estimates of its mean and its mean square in each block."""
    mean = first.mean()
    influence = second - second.mean() - 2 * mean * (first - mean)
    return Estimate(float(second.mean() - mean**2), sum_per_sequence(influence / len(influence), sequence))


def sum_per_sequence(influence: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """[blocks] -> [sequences]"""
    _, sequence = np.unique(sequence, return_inverse=True)
    return np.bincount(sequence, weights=influence)
