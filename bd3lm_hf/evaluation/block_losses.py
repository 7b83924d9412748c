"""The losses of blocks under noise, and what they say of every interval of t, from one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.collators import BD3LMDataCollator
from ..modeling.configuration_bd3lm import BD3LMConfig, validate_noise_interval
from ..modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL, NOISE_SCHEDULES
from ..modeling.two_stream_block_diffusion import TextBlocks
from ..noise.counts import masked_count_law
from ..noise.intervals import noise_interval_grid
from ..noise.sampler import Noise, NoiseSampler
from .estimate import Estimate, sum_per_sequence, variance_of_blocks
from .mode import evaluation_mode
from .pieces import token_nelbo


# What `block_statistics` finds out of each block.
BLOCK_STATISTICS = ("t", "num_masked", "num_tokens", "loss", "num_bytes")


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
        return cls.of_columns(columns, model.config.noise_schedule)

    @classmethod
    def of_columns(cls, columns: dict[str, np.ndarray], noise_schedule: str) -> "BlockLosses":
        """What [`predicted_blocks`] makes of the statistics of batches."""
        names = [field.name for field in fields(cls) if field.name != "noise_schedule"]
        return cls(**{name: columns[name] for name in names}, noise_schedule=noise_schedule)

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
        return variance_of_blocks(*self._moments(noise_interval, masking), self.sequence)

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
    """[batch, length] -> [batch, blocks], float32 or wider."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    sums = values.new_zeros(len(values), int(blocks.block.max()) + 1)
    return sums.scatter_add_(1, blocks.block, values)


@torch.no_grad()
def block_statistics(
    model,
    inputs: dict[str, torch.Tensor],
    noise: Noise,
    blocks: TextBlocks,
    *,
    weighted: bool = False,
    token_bytes: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Scores one batch under one noised copy of it.

    Args:
        model: A `BD3LMForMaskedLM`, or what is wrapped around one.
        inputs: What it takes beside the noise: `input_ids`, perhaps `labels` and so on, each [batch, length].
        noise: The noise of these texts.
        blocks: Their blocks.
        weighted: Whether each token's loss is weighted as the noise says; otherwise by 1.
        token_bytes: How many bytes the token of each id encodes [vocab]; 0 by default.

    Returns:
        What `BLOCK_STATISTICS` names of each block [batch, blocks, 5]: its t (NaN where the masked tokens were counted
        instead), its masked tokens, its predicted tokens, the loss of the masked ones in nats, the bytes of the
        predicted ones.
    """
    x_0 = inputs["input_ids"]
    if not weighted:
        noise = replace(noise, loss_weights=torch.ones_like(noise.loss_weights))
    nelbo = token_nelbo(model, inputs, blocks, noise)
    num_bytes = torch.zeros_like(x_0)
    if token_bytes is not None:
        num_bytes = token_bytes.to(x_0.device)[inputs.get("labels", x_0).clamp(min=0)] * blocks.predicted
    masked = (noise.x_t != x_0) & blocks.predicted
    sums = [sum_per_block(values, blocks) for values in (masked, blocks.predicted, nelbo, num_bytes)]
    return torch.stack([noise.t[:, 0], *sums], dim=-1)


def predicted_blocks(statistics: np.ndarray, first_sequence: int = 0) -> dict[str, np.ndarray]:
    """
    The columns of all blocks that hold a predicted token.

    Args:
        statistics: What [`block_statistics`] returns [sequences, blocks, 5]; rows of fewer blocks than others are
            filled up with a negative number.
        first_sequence: Number of the first sequence.

    Returns:
        A column [blocks] for each of `BLOCK_STATISTICS`, and `sequence`, the number of each block's sequence.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    columns = dict(zip(BLOCK_STATISTICS, np.moveaxis(statistics, -1, 0), strict=True))
    numbers = first_sequence + np.arange(len(statistics))
    columns["sequence"] = numbers[:, None].repeat(statistics.shape[1], axis=1)
    counts = columns["num_tokens"] > 0
    columns = {name: column[counts] for name, column in columns.items()}
    integers = {name: columns[name].astype(int) for name in ("num_masked", "num_tokens", "num_bytes", "sequence")}
    return {**columns, **integers}


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
    """The columns that [`predicted_blocks`] gives, of all sequences and draws; see [`nelbo_variance`]."""
    validate_noise_interval(noise_interval)
    config = model.config
    collate = BD3LMDataCollator(config.pad_token_id or 0, config.ignore_bos)
    parts = []
    total = num_draws * len(sequences)
    with evaluation_mode(model), tqdm(total=total, unit=" sequences", disable=not progress) as bar:
        for draw in range(num_draws):
            for start in range(0, len(sequences), batch_size):
                batch = collate([{"input_ids": ids} for ids in sequences[start : start + batch_size]])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                noise, blocks = draw_noise(
                    noise_sampler,
                    config,
                    noise_interval,
                    batch,
                    seed=(seed, draw),
                    first_row=start,
                    num_rows=len(sequences),
                )
                statistics = block_statistics(model, batch, noise, blocks, weighted=weighted)
                parts.append(predicted_blocks(statistics.cpu().numpy(), first_sequence=start))
                bar.update(len(batch["input_ids"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw_noise(
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
