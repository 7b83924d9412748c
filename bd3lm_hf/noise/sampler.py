"""
The noise of training and evaluation, drawn so that it depends on the seed, the step and the row, and on nothing else.

However a batch is cut into smaller ones, over devices or over time, each row meets the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..modeling.configuration_bd3lm import BD3LMConfig
from ..modeling.diffusion_block_diffusion import NOISE_SCHEDULES, sigma_from_mask_probability
from ..modeling.two_stream_block_diffusion import TextBlocks
from .counts import binomial_probabilities, masked_count_law


MASKING_NAMES = ("bernoulli", "exact_count")
NOISE_LEVEL_NAMES = ("block", "row", "document")
LOSS_WEIGHT_NAMES = ("nelbo", "uniform")


@dataclass
class Noise:
    """
    Noised copies of a batch, one after the other in each row.

    Attributes:
        x_t: ids [batch, copies * length].
        loss_weights: weight of each token in the loss, where it is masked; float32, of that shape.
        t: time of each block, [batch, copies, blocks]; NaN where the masked tokens were counted instead.
        timesteps: sigma of each token, for a time-conditioned model; otherwise None.
        num_masked: of all tokens of `x_t`, where it was counted.
    """

    x_t: torch.Tensor
    loss_weights: torch.Tensor
    t: torch.Tensor
    timesteps: torch.Tensor | None
    num_masked: int | None = None

    def inputs(self, x_0: torch.Tensor) -> dict[str, torch.Tensor]:
        """What [`BD3LMForMaskedLM.forward`] takes for this noise, beside the `labels`."""
        inputs = {"input_ids": self.x_t, "clean_input_ids": x_0, "loss_weights": self.loss_weights}
        return inputs if self.timesteps is None else {**inputs, "timesteps": self.timesteps}


@dataclass
class NoiseSampler:
    """
    Draws the noise of a batch (arXiv 2503.09573, Sec. 5, and beyond).

    Attributes:
        antithetic: deal the strata of [0, 1) to all copies of all blocks of all rows of the batch, one each, so that
            the copies of a block lie far apart; otherwise the draws are independent.
        masking: "bernoulli" masks each token of a block by itself with probability p(t). "exact_count" draws their
            number k >= 1 in place of t, stratified as t would be, and then which: the same mean of the loss without
            blocks that have nothing to predict, and without the variance of the number given t, or of t given the
            number. A time-conditioned model reads t, so that it draws t first and then k.
        num_copies: noised copies of each row.
        complementary: of two copies, the second masks what the first leaves, so that each token is predicted once.
            Both are weighted by how often either comes to their number of masked tokens (the balance heuristic), which
            keeps the mean for any interval.
        noise_level_per: what shares a t: each block has its own (BD3-LM), or all blocks of a "row" (dLLM's A2D), or
            of a "document" (SDAR, arXiv 2510.06303). The mean of the loss is the same.
        loss_weight: "nelbo" weighs a block by w(t), so that the mean is the bound. "uniform" gives each masked token
            the weight 1: the mean of their cross-entropy (Fast-dLLM v2, arXiv 2509.26328, with complementary copies,
            where each token is predicted once).
    """

    antithetic: bool = True
    masking: str = "bernoulli"
    num_copies: int = 1
    complementary: bool = False
    noise_level_per: str = "block"
    loss_weight: str = "nelbo"

    def draw(
        self,
        config: BD3LMConfig,
        noise_interval: tuple[float, float],
        x_0: torch.Tensor,
        blocks: TextBlocks,
        rows: Sequence[int],
        num_rows: int,
        seed: tuple[int, ...],
    ) -> Noise:
        """
        Args:
            config: schedule and mask token.
            noise_interval: (beta, omega) that t is drawn from.
            x_0: ids [batch, length].
            blocks: the blocks of `x_0`.
            rows: the numbers of these rows within the whole batch that shares its strata.
            num_rows: rows of the whole batch.
            seed: of the whole batch.
        """
        self.validate(config)
        strata = np.random.default_rng(np.random.SeedSequence(seed)).permutation(num_rows)
        block, predicted = blocks.block.cpu().numpy(), blocks.predicted.cpu().numpy()
        document = self._level_ids(blocks).cpu().numpy()
        masked = np.zeros((len(block), self.num_copies, block.shape[1]), dtype=bool)
        weights = np.zeros(masked.shape, dtype=np.float32)
        t = np.full((*masked.shape[:2], int(block.max()) + 1), np.nan, dtype=np.float32)
        for index, row in enumerate(rows):
            text = _RowText(config, noise_interval, block[index], predicted[index], document[index], self.loss_weight)
            # A seed with zeros behind it is the same seed, so the row is no part of it.
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(row,)))
            mask = self._way_to_mask(config, text)
            levels_of_copies = self._levels(text.num_levels, strata[row % num_rows] / num_rows, num_rows, rng)
            for copy, levels in enumerate(levels_of_copies[:, text.level]):
                masked[index, copy], weights[index, copy], t[index, copy, text.blocks] = mask(levels, rng)
            if self.complementary:
                masked[index, 1] = predicted[index] & ~masked[index, 0]
                weights[index] = [text.complementary_weights(part) for part in masked[index]]
        return self._on_device(config, x_0, blocks, masked, weights, t)

    def _level_ids(self, blocks: TextBlocks) -> torch.Tensor:
        """The number, within its row, of what shares a level with each token [batch, length]."""
        if self.noise_level_per == "block":
            return blocks.block
        if self.noise_level_per == "row":
            return torch.zeros_like(blocks.block)
        starts = nn.functional.pad(blocks.position_ids.diff(dim=-1) != 1, (1, 0))
        return starts.long().cumsum(-1).expand(blocks.block.shape)

    def _levels(self, num_blocks: int, start: float, num_rows: int, rng: np.random.Generator) -> np.ndarray:
        """
        A level in [0, 1) for each copy of each block of a row, or of what shares one, [copies, blocks].

        Stratified, the copies of a block share out [0, 1) in equal parts, the blocks of a row share out each part, and
        of that share the row gets the stratum at `start`, a multiple of 1 / `num_rows`.
        """
        num_copies = 1 if self.complementary else self.num_copies
        levels = rng.random((num_copies, num_blocks))
        if not self.antithetic or num_blocks == 0:
            return levels
        levels = (rng.permutation(num_blocks) + start + levels / num_rows) / num_blocks
        part = rng.random(levels.shape).argsort(axis=0)
        return (part + levels) / num_copies

    def _way_to_mask(self, config: BD3LMConfig, text: "_RowText"):
        # To share a t, blocks must draw it, and not the number of their masked tokens.
        has_own_t = self.noise_level_per == "block"
        if self.complementary:
            return text.any_count if has_own_t else text.bernoulli
        if self.masking == "bernoulli":
            return text.bernoulli
        return text.exact_count if has_own_t and not config.time_conditioning else text.exact_count_given_t

    def validate(self, config: BD3LMConfig) -> None:
        """
        Whether a model of this `config` can be trained under this noise.

        Raises:
            ValueError: an unknown `masking`, `noise_level_per` or `loss_weight`, no copy, complementary masks of other
                than two copies or for a model that reads t.
        """
        choices = {"masking": MASKING_NAMES, "noise_level_per": NOISE_LEVEL_NAMES, "loss_weight": LOSS_WEIGHT_NAMES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but got {getattr(self, name)!r}.")
        if self.num_copies < 1:
            raise ValueError(f"`num_noise_samples` must be at least 1, but got {self.num_copies}.")
        if not self.complementary:
            return
        if self.num_copies != 2:
            raise ValueError(
                f"`complementary_masks` takes `num_noise_samples` = 2, one the complement of the other, but got "
                f"{self.num_copies}."
            )
        if config.time_conditioning:
            raise ValueError(
                "`complementary_masks` weighs copies by their number of masked tokens, so the model must not read the "
                "time, but its `time_conditioning` is True."
            )

    def _on_device(self, config, x_0, blocks, masked, weights, t) -> Noise:
        device, num_masked = x_0.device, int(masked.sum())
        masked, weights = (torch.from_numpy(array).to(device).flatten(1) for array in (masked, weights))
        t = torch.from_numpy(t).to(device)
        timesteps = None
        if config.time_conditioning:
            # Where nothing may be masked no t was drawn, and none matters.
            token_t = t.nan_to_num(0.0).gather(2, blocks.block[:, None].expand(-1, self.num_copies, -1)).flatten(1)
            timesteps = sigma_from_mask_probability(NOISE_SCHEDULES[config.noise_schedule].mask_probability(token_t))
        x_t = torch.where(masked, config.mask_token_id, x_0.repeat(1, self.num_copies))
        # Both weights of a complementary pair are parts of one estimate; other copies are averaged.
        num_estimates = 1 if self.complementary else self.num_copies
        return Noise(x_t, weights / num_estimates, t, timesteps, num_masked)


class _RowText:
    """
    One row and the ways to mask it. Only blocks that hold a predicted token count, so padding and prompts change
    nothing.

    Each way takes a level in [0, 1) per block, the quantile of what is drawn for it, and a generator for the rest. It
    returns (masked [length], loss weights [length], t [blocks]).
    """

    def __init__(self, config, noise_interval, block, predicted, level_ids, loss_weight: str):
        self.schedule_name, self.noise_interval = config.noise_schedule, tuple(noise_interval)
        self.is_uniform = loss_weight == "uniform"
        self.schedule = NOISE_SCHEDULES[config.noise_schedule]
        self.predicted = predicted
        # Of each predicted token the number of its block among those of `blocks`, and how many each holds.
        self.blocks, first, self.block, self.num_maskable = np.unique(
            block[predicted], return_index=True, return_inverse=True, return_counts=True
        )
        self.num_blocks = len(self.blocks)
        # Of each of these blocks the number of its level.
        levels, self.level = np.unique(level_ids[predicted][first], return_inverse=True)
        self.num_levels = len(levels)

    def bernoulli(self, levels, rng):
        t = self._times(levels)
        mask_probability, loss_weight = self.schedule.mask_probability(t), self._loss_weight(t)
        masked = rng.random(len(self.block)) < mask_probability.numpy()[self.block]
        return self._in_row(masked), self._in_row(loss_weight.numpy()[self.block]), t.numpy()

    def exact_count(self, levels, rng):
        count, weight = np.zeros(self.num_blocks, dtype=int), np.zeros(self.num_blocks)
        for chosen, law in self._laws():
            count[chosen] = _quantile(law.positive_probability, levels[chosen])
            weight[chosen] = 1 - law.probability[0] if self.is_uniform else law.exact_count_weight[count[chosen]]
        return self._random_tokens(count, rng), self._in_row(weight[self.block]), np.nan

    def exact_count_given_t(self, levels, rng):
        t = self._times(levels)
        mask_probability, loss_weight = self.schedule.mask_probability(t), self._loss_weight(t)
        quantiles = rng.random(self.num_blocks)
        count, weight = np.zeros(self.num_blocks, dtype=int), np.zeros(self.num_blocks)
        for num_tokens in np.unique(self.num_maskable):
            chosen = self.num_maskable == num_tokens
            law = binomial_probabilities(int(num_tokens), mask_probability[chosen]).numpy()[:, 1:]
            any_masked = law.sum(axis=1, keepdims=True)
            count[chosen] = 1 + _quantile(law / any_masked, quantiles[chosen, None])
            weight[chosen] = loss_weight.numpy()[chosen] * any_masked[:, 0]
        return self._random_tokens(count, rng), self._in_row(weight[self.block]), t.numpy()

    def any_count(self, levels, rng):
        """The first of two complementary copies: it may mask no token of a block, or all."""
        count = np.zeros(self.num_blocks, dtype=int)
        for chosen, law in self._laws():
            count[chosen] = _quantile(law.probability, levels[chosen])
        return self._random_tokens(count, rng), 0, np.nan

    def complementary_weights(self, masked: np.ndarray) -> np.ndarray:
        """The weight of each token in a copy with these masks, [length]."""
        if self.is_uniform:
            return self._in_row(np.ones(len(self.block)))
        count = np.bincount(self.block, weights=masked[self.predicted], minlength=self.num_blocks).astype(int)
        weight = np.zeros(self.num_blocks)
        for chosen, law in self._laws():
            weight[chosen] = law.complementary_weight[count[chosen]]
        return self._in_row(weight[self.block])

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t) if self.is_uniform else self.schedule.loss_weight(t)

    def _times(self, levels: np.ndarray) -> torch.Tensor:
        beta, omega = self.noise_interval
        return torch.from_numpy(beta + (omega - beta) * levels)

    def _laws(self):
        """The blocks of each number of maskable tokens, bool [blocks], with the law of its masked ones."""
        for num_tokens in np.unique(self.num_maskable):
            law = masked_count_law(int(num_tokens), self.schedule_name, self.noise_interval)
            yield self.num_maskable == num_tokens, law

    def _random_tokens(self, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A uniform subset of the maskable tokens of each block, of the size `count` [blocks]."""
        shuffled = np.lexsort((rng.random(len(self.block)), self.block))
        place = np.empty_like(shuffled)
        place[shuffled] = np.arange(len(shuffled)) - np.searchsorted(self.block, self.block)
        return self._in_row(place < count[self.block])

    def _in_row(self, of_predicted: np.ndarray) -> np.ndarray:
        """Values of the predicted tokens at their columns, 0 elsewhere."""
        row = np.zeros(len(self.predicted), dtype=of_predicted.dtype)
        row[self.predicted] = of_predicted
        return row


def _quantile(probability: np.ndarray, level: np.ndarray) -> np.ndarray:
    """
    The outcome 0, 1, ... at which the distribution function passes `level` in [0, 1): of one law [outcomes] for all
    levels [n], or of a law [n, outcomes] for each level [n, 1]; the result is [n].
    """
    last = probability.shape[-1] - 1
    if probability.ndim == 1:
        return np.searchsorted(probability.cumsum(), level, side="right").clip(max=last)
    return (probability.cumsum(axis=1) <= level).sum(axis=1).clip(max=last)
