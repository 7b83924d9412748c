"""
Ways to the NELBO of a batch of texts: over all masks, over drawn ones, or token by token.

For one block, integrating t out of the bound of arXiv 2503.09573 (Eq. 8) leaves a sum over the number of masked
tokens,

    NELBO = sum_{k = 1..m} 1/k E_{|M| = k}[sum_{i in M} -log x_theta(x_i | x without M, earlier blocks)],

with m the tokens of the block that are predicted and M a uniform subset of them; the noise schedule drops out.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch

from ..modeling.configuration_bd3lm import BD3LMConfig
from ..modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL
from ..modeling.two_stream_block_diffusion import TextBlocks
from ..noise.sampler import Noise, NoiseSampler
from .pieces import token_nelbo


ESTIMATOR_NAMES = ("exact", "stratified", "monte_carlo")
# The largest number of tokens of a block whose subsets are enumerated: 4095 masks.
MOST_ENUMERATED_TOKENS = 12
# Noised copies of a text for one clean stream: the clean one is then a small part of the work, and memory is bounded.
MASKS_PER_FORWARD = 8
# Copies of a draw, which share out [0, 1) between them; different draws are independent.
COPIES_PER_DRAW = 4


def subset_noise(config: BD3LMConfig, x_0: torch.Tensor, blocks: TextBlocks, subsets: range) -> Noise:
    """
    Copies of a batch in which each block has some of its subsets masked, all blocks at once.

    Bit j of a subset's number says whether the j-th predicted token of a block is masked. A mask M with k of the m
    predicted tokens weighs 1 / (k binom(m, k)), so that the weighted losses of all 2^m - 1 add up to the NELBO. Where
    a block has no subset of some number, nothing is masked.

    Args:
        x_0: ids [batch, length].
        blocks: the blocks of `x_0`.
        subsets: numbers of the subsets, from 1 on, one copy each.
    """
    block, predicted = blocks.block, blocks.predicted
    counts = predicted.new_zeros((len(x_0), int(block.max()) + 1), dtype=torch.long)
    counts = counts.scatter_add_(1, block, predicted.long())
    num_predicted = counts.gather(1, block)[:, None]
    before = (counts.cumsum(1) - counts).gather(1, block)
    place = (predicted.long().cumsum(1) - 1 - before).clamp(min=0)[:, None]
    subset = torch.arange(subsets.start, subsets.stop, device=x_0.device)[:, None]
    masked = predicted[:, None] & ((subset >> place) % 2 == 1) & (subset >> num_predicted == 0)
    largest = int(counts.max())
    weight = torch.zeros(largest + 1, subsets[-1].bit_length() + 1, device=x_0.device)
    for size in range(1, largest + 1):
        for k in range(1, min(size + 1, weight.shape[1])):
            weight[size, k] = 1 / (k * math.comb(size, k))
    num_masked = torch.tensor([number.bit_count() for number in subsets], device=x_0.device)[:, None]
    x_t = torch.where(masked, config.mask_token_id, x_0[:, None]).flatten(1)
    t = torch.full((len(x_0), len(subsets), counts.shape[1]), torch.nan, device=x_0.device)
    return Noise(x_t, weight[num_predicted, num_masked].flatten(1), t, timesteps=None)


class ExactNoise:
    """
    All masks of each block, `num_forwards` passes with several of them each.

    Args:
        config: that of the model.
        most_predicted: the largest number of predicted tokens in a block.

    Raises:
        ValueError: too many masks; a model that reads t, for which the sum over masks is no integral over t.
    """

    def __init__(self, config: BD3LMConfig, most_predicted: int):
        if config.time_conditioning:
            raise ValueError(
                "`estimator` must be 'stratified' or 'monte_carlo' for a model with `time_conditioning`, whose loss "
                "depends on t and not on the masks alone, but got 'exact'."
            )
        if most_predicted > MOST_ENUMERATED_TOKENS:
            raise ValueError(
                f"`estimator` 'exact' enumerates the masks of a block, 2^k - 1 of k predicted tokens; it takes up to "
                f"k = {MOST_ENUMERATED_TOKENS}, but got a block with k = {most_predicted}. 'stratified' draws "
                "among them."
            )
        self.config = config
        self.num_masks = 2**most_predicted - 1
        self.num_forwards = -(-self.num_masks // MASKS_PER_FORWARD)

    def of_batch(self, x_0: torch.Tensor, blocks: TextBlocks, rows: Sequence[int], draw: int) -> Iterator[Noise]:
        for first in range(1, self.num_masks + 1, MASKS_PER_FORWARD):
            subsets = range(first, min(first + MASKS_PER_FORWARD, self.num_masks + 1))
            yield subset_noise(self.config, x_0, blocks, subsets)


class DrawnNoise:
    """
    One pass with [`COPIES_PER_DRAW`] noised copies, in which all blocks of a row and copies share out [0, 1).

    `stratified` draws the number of masked tokens, then which; where the model reads t, t first. `monte_carlo` draws t
    and masks each token by itself, as the paper does. Rows and draws are independent of each other, and a row's noise
    depends on its number, the draw and the seed alone.
    """

    num_forwards = 1

    def __init__(self, config: BD3LMConfig, estimator: str, seed: int):
        masking = "exact_count" if estimator == "stratified" else "bernoulli"
        self.sampler = NoiseSampler(masking=masking, num_copies=COPIES_PER_DRAW)
        self.config, self.noise_interval, self.seed = config, FULL_NOISE_INTERVAL, seed
        if estimator == "stratified" and not config.time_conditioning:
            # With t integrated out nothing is singular at t = 0, and the weights are 1/k under any schedule.
            self.config = copy.deepcopy(config)
            self.config.noise_schedule, self.noise_interval = "loglinear", (0.0, 1.0)

    def of_batch(self, x_0: torch.Tensor, blocks: TextBlocks, rows: Sequence[int], draw: int) -> Iterator[Noise]:
        yield self.sampler.draw(
            self.config, self.noise_interval, x_0, blocks, rows, num_rows=1, seed=(self.seed, draw)
        )


class BlockDiffusionScorer:
    """The NELBO of each token under a `BD3LMForMaskedLM`, in parts: one for each forward pass."""

    def __init__(self, model, noise: ExactNoise | DrawnNoise):
        self.model, self.noise, self.num_forwards = model, noise, noise.num_forwards

    def parts(self, batch: dict[str, torch.Tensor], rows: Sequence[int], draw: int) -> Iterator[torch.Tensor]:
        """
        Args:
            batch: `input_ids`, `labels` and perhaps `attention_mask` [batch, length].
            rows: the numbers of these rows in the corpus.
            draw: number of the draw.

        Yields:
            What adds up to the NELBO of each token, in nats [batch, length]; 0 where nothing is predicted.
        """
        x_0 = batch["input_ids"]
        blocks = TextBlocks.of_batch(self.model.config, **batch)
        for noise in self.noise.of_batch(x_0, blocks, rows, draw):
            yield token_nelbo(self.model, batch, blocks, noise)


class CausalScorer:
    """The same for an autoregressive model of Transformers, whose -log p is exact and takes one pass."""

    num_forwards = 1

    def __init__(self, model):
        self.model = model

    def parts(self, batch: dict[str, torch.Tensor], rows: Sequence[int], draw: int) -> Iterator[torch.Tensor]:
        """See [`BlockDiffusionScorer.parts`]."""
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs, use_cache=False).logits
        nats = torch.zeros(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        # Row by row: a second copy of all logits would be the most that is ever held.
        for row, target in enumerate(labels.to(logits.device)):
            predicted = (target != -100).nonzero().squeeze(-1)
            scores = logits[row, predicted - 1].to(nats.dtype)
            nats[row, predicted] = torch.nn.functional.cross_entropy(scores, target[predicted], reduction="none")
        yield nats
