"""Samplers: given a block that is partly masked, which tokens to reveal now. No sampler knows the model."""

import inspect

import torch
from torch import Tensor

from .diffusion_block_diffusion import NOISE_SCHEDULES, generator_of


class BlockNoise:
    """
    The random numbers of one block. With `seeds`, one for each row, each row has a generator of its own: its numbers
    depend on its seed and the number of its block, counted in the row's own positions, so that they are the same
    whatever rows share the batch, and in a text that is continued. Without, torch's global generator draws them.
    """

    # Generators of rows draw on the CPU; so many draws go to the device in one copy, for which the host waits.
    num_ahead = 64

    def __init__(self, seeds: list[int] | None, blocks: list[int], shape: torch.Size, device: torch.device):
        self.shape, self.device, self.generators, self._drawn = shape, device, None, []
        if seeds is not None:
            # Numbers that differ for neighbouring seeds and blocks.
            self.generators = [generator_of(f"{seed} {block}") for seed, block in zip(seeds, blocks, strict=True)]

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), [batch, block_size]."""
        if self.generators is None:
            return torch.rand(self.shape, device=self.device)
        if not self._drawn:
            # No block takes more than two draws and one for each of its tokens, but for samplers with steps of theirs.
            sizes = min(self.shape[1] + 2, self.num_ahead), self.shape[1]
            rows = [torch.rand(sizes, generator=generator) for generator in self.generators]
            self._drawn = [*torch.stack(rows, dim=1).to(self.device).flip(0)]
        return self._drawn.pop()


class Sampler:
    """
    Decides, step by step, which tokens of a block are revealed; one is made for each block. It is asked for the masked
    positions to predict (a step without any costs no forward), the noise level to tell a time-conditioned network, the
    predicted tokens to reveal, and the revealed ones to mask again. A sampler of one's own overrides `reveal`, and is
    passed as `generate(sampler=MySampler())` or named in `SAMPLERS`. Masks are bool [batch, block_size].
    """

    # What `reveal` is told of the predictions (see `confidence_of`); nothing spares a softmax over the vocabulary.
    confidence: str | None = None
    # Whether a step may have no candidates.
    may_pause = False
    # Whether `remask` is asked.
    may_remask = False
    # How much confidences may differ by rounding, as a share; that of the dtype of the logits before `reveal`.
    tolerance = torch.finfo(torch.float32).eps ** 0.5

    def start(self, masked: Tensor, noise: BlockNoise) -> None:
        """Called before the first step with the `masked` positions [batch, block_size] and the block's `noise`."""
        self.noise = noise

    def is_finished(self, masked: Tensor) -> bool:
        """Whether the block is done; `masked`, bool [batch, block_size], is what is left of it."""
        return not masked.any()

    def num_steps(self, masked: Tensor) -> int:
        """Steps of a block of which at first these are `masked`, bool [batch, block_size]; 0 if predictions decide."""
        return 0

    def candidates(self, masked: Tensor) -> Tensor:
        """The positions out of the `masked` ones, bool [batch, block_size], to predict now, of the same shape."""
        return masked

    def mask_probability(self, masked: Tensor) -> Tensor:
        """p of each row's block [batch]: by default the fraction of it that is `masked`, bool [batch, block_size]."""
        return masked.float().mean(-1)

    def reveal(self, candidates: Tensor, confidence: Tensor | None) -> Tensor:
        """
        Which of the `candidates` to reveal, both bool [batch, block_size]; at least one in each row that has any.
        `confidence` is how sure the model is at each candidate [batch, block_size], -inf elsewhere.
        """
        return candidates

    def remask(self, known: Tensor) -> Tensor:
        """After a step, which of the tokens `known` before it are masked again, bool [batch, block_size]."""
        return torch.zeros_like(known)

    def surest(self, confidence: Tensor, number: Tensor) -> Tensor:
        """
        The `number` [batch, 1] of candidates of the largest `confidence` [batch, block_size], bool of its shape. Those
        that rounding could put before or after the last of them are equally sure: they go from left to right.
        """
        last = confidence.sort(-1, descending=True).values.gather(-1, (number - 1).clamp(min=0))
        # Near 0 a difference, of which a margin is one, is known by its terms' rounding.
        margin = self.tolerance * last.abs().clamp(min=0.01)
        is_surer = confidence > last + margin
        is_equal = (confidence >= last - margin) & ~is_surer & (confidence > -torch.inf)
        return is_surer | is_equal & (is_equal.long().cumsum(-1) <= number - is_surer.sum(-1, keepdim=True))


class FirstHittingSampler(Sampler):
    """
    Reveals one uniformly chosen masked token per forward (Zheng et al., arXiv 2409.02908, Alg. 1): the ancestral
    sampler in the limit of infinitely many steps. With n tokens masked, the next time is p <- p u^(1/n), u uniform.
    """

    def start(self, masked: Tensor, noise: BlockNoise) -> None:
        super().start(masked, noise)
        # Uniform in random order is the order of uniform numbers. Their ranks are never alike.
        self._rank, self._uniform = noise.uniform().argsort(stable=True).argsort(), noise.uniform()
        self._mask_probability = torch.ones(masked.shape[0], device=masked.device)

    def num_steps(self, masked: Tensor) -> int:
        return int(masked.sum(-1).max())

    def candidates(self, masked: Tensor) -> Tensor:
        rank = torch.where(masked, self._rank, masked.shape[1])
        return self._rank == rank.amin(-1, keepdim=True)

    def mask_probability(self, masked: Tensor) -> Tensor:
        num_masked = masked.sum(-1)
        uniform = self._uniform.gather(1, (num_masked - 1).clamp(min=0)[:, None]).squeeze(1)
        self._mask_probability = self._mask_probability * uniform ** (1 / num_masked.clamp(min=1))
        return self._mask_probability


class AncestralSampler(Sampler):
    """
    The reverse process in `denoising_steps` steps from t = 1 to 0 (arXiv 2503.09573, Sec. 3.2; arXiv 2406.07524,
    Eq. 7): from p(t), that of the `noise_schedule`, to p(s) each masked token is revealed with probability
    (p(t) - p(s)) / p(t), drawn before it is predicted. Each row goes on to its next step that reveals a token.

    With a `remask_cap` in (0, 1], ReMDM's capped schedule (arXiv 2503.00307, Sec. 4.1): each token known before the
    step is masked again with probability sigma = min(remask_cap, p(s) / (1 - p(t))), and masked ones are revealed with
    probability (1 - p(s) - (1 - sigma) (1 - p(t))) / p(t), so that the masked fraction keeps to the schedule.
    """

    def __init__(self, denoising_steps: int, noise_schedule: str = "loglinear", remask_cap: float = 0.0):
        t = torch.arange(denoising_steps + 1, dtype=torch.float64) / denoising_steps
        levels = NOISE_SCHEDULES[noise_schedule].mask_probability(t).flip(0).tolist()
        # Everything is masked at the start and nothing at the end, where some schedules stop short by 1e-3.
        self.levels = [1.0, *levels[1:-1], 0.0]
        self.remask_cap, self.may_remask, self.may_pause = remask_cap, remask_cap > 0, remask_cap > 0
        # With remasking, p(t) and p(s) of the steps that are left, the first at the end.
        self._left, self._remask_probability = [*zip(self.levels, self.levels[1:])][::-1], 0.0

    def start(self, masked: Tensor, noise: BlockNoise) -> None:
        super().start(masked, noise)
        # A token's step is that in which p falls to a uniform number: its p(t) is the least level above the number.
        levels = torch.tensor(self.levels[::-1], device=masked.device)
        self._level = levels[torch.bucketize(noise.uniform(), levels, right=True)]

    def num_steps(self, masked: Tensor) -> int:
        levels = torch.nn.functional.pad(torch.where(masked, self._level, 0.0).sort(-1).values, (1, 0))
        return 0 if self.may_remask else int((levels.diff(dim=-1) > 0).sum(-1).max())

    def is_finished(self, masked: Tensor) -> bool:
        return not self._left if self.may_remask else super().is_finished(masked)

    def candidates(self, masked: Tensor) -> Tensor:
        if not self.may_remask:
            return masked & (self._level == self.mask_probability(masked)[:, None])
        before, after = self._left.pop()
        self._level = torch.full(masked.shape, before, device=masked.device)
        self._remask_probability = min(self.remask_cap, after / (1 - before)) if before < 1 else 0.0
        probability = (1 - after - (1 - self._remask_probability) * (1 - before)) / before
        return masked & (self.noise.uniform() < probability)

    def mask_probability(self, masked: Tensor) -> Tensor:
        return torch.where(masked, self._level, 0.0).amax(-1)

    def remask(self, known: Tensor) -> Tensor:
        return known & (self.noise.uniform() < self._remask_probability)


class ConfidenceSampler(Sampler):
    """
    Reveals the tokens that the model is surest of by its `confidence`, a name in CONFIDENCES.

    With `denoising_steps`, the ceil(n / k) surest ones of n masked tokens with k steps left (MaskGIT, arXiv
    2202.04200); with `confidence_threshold`, all above it and at least the surest one (Fast-dLLM, arXiv 2505.22618);
    with `tokens_per_step`, so many of the surest, or with a threshold as well at least so many (SDAR, arXiv
    2510.06303). With a `sub_block_size` only tokens of the leftmost part of the block that has a masked one; the parts
    are of so many tokens, but for the block's first token, which is one by itself (Fast-dLLM v2, arXiv 2509.26328).
    """

    def __init__(
        self,
        denoising_steps: int | None = None,
        confidence_threshold: float | None = None,
        confidence: str | None = "probability",
        tokens_per_step: int = 1,
        sub_block_size: int | None = None,
    ):
        self.denoising_steps = self.steps_left = denoising_steps
        self.confidence_threshold = confidence_threshold
        self.confidence, self.tokens_per_step, self.sub_block_size = confidence, tokens_per_step, sub_block_size

    def start(self, masked: Tensor, noise: BlockNoise) -> None:
        super().start(masked, noise)
        if self.denoising_steps is not None:
            # More steps than tokens reveal one at a time.
            self.steps_left = torch.full((), min(self.denoising_steps, masked.shape[1]), device=masked.device)

    def num_steps(self, masked: Tensor) -> int:
        if self.confidence_threshold is not None or self.sub_block_size is not None:
            return 0
        num_masked, most = int(masked.sum(-1).max()), self.denoising_steps
        return -(-num_masked // self.tokens_per_step) if most is None else min(most, num_masked)

    def candidates(self, masked: Tensor) -> Tensor:
        if self.sub_block_size is None:
            return masked
        part = torch.arange(masked.shape[-1], device=masked.device) // self.sub_block_size + 1
        part[0] = 0
        return masked & (part == part.masked_fill(~masked, len(part) + 1).amin(-1, keepdim=True))

    def reveal(self, candidates: Tensor, confidence: Tensor) -> Tensor:
        num_masked = candidates.sum(-1, keepdim=True)
        number = num_masked.clamp(max=self.tokens_per_step)
        if self.confidence_threshold is None and self.denoising_steps is not None:
            number = -(-num_masked // self.steps_left.clamp(min=1))
            self.steps_left = self.steps_left - 1
        revealed, threshold = self.surest(confidence, number), self.confidence_threshold
        return revealed if threshold is None else revealed | (confidence > threshold)


class SequentialSampler(ConfidenceSampler):
    """Reveals tokens from left to right: `tokens_per_step`, or by `denoising_steps` as the [`ConfidenceSampler`]."""

    def __init__(self, denoising_steps: int | None = None, tokens_per_step: int = 1):
        super().__init__(denoising_steps, confidence=None, tokens_per_step=tokens_per_step)

    def reveal(self, candidates: Tensor, confidence: Tensor | None) -> Tensor:
        order = -torch.arange(candidates.shape[-1], device=candidates.device, dtype=torch.float32)
        return super().reveal(candidates, order.masked_fill(~candidates, -torch.inf))


class EntropyBoundSampler(Sampler):
    """
    Reveals the tokens of least entropy as long as their summed entropy less the largest of them, what predicting them
    independently can cost, stays within `entropy_bound`, in nats (arXiv 2505.24857); 0 reveals one token.
    """

    confidence = "negative_entropy"

    def __init__(self, entropy_bound: float):
        self.entropy_bound = entropy_bound

    def reveal(self, candidates: Tensor, confidence: Tensor) -> Tensor:
        entropy = (-confidence).sort(dim=-1).values
        # In ascending order the sum less the largest is the sum of those before; what is no candidate comes last.
        before = torch.nn.functional.pad(entropy.cumsum(-1)[:, :-1], (1, 0))
        # What a model is certain of has an entropy of some 1e-7, or 0.
        is_within = (before <= self.entropy_bound + 1e-5) & (entropy < torch.inf)
        return self.surest(confidence, is_within.sum(-1, keepdim=True))


# The names that `generate(sampler=...)` takes; a class that is added here can be named, too.
SAMPLERS: dict[str, type[Sampler]] = {
    "first_hitting": FirstHittingSampler,
    "ancestral": AncestralSampler,
    "confidence": ConfidenceSampler,
    "sequential": SequentialSampler,
    "entropy_bound": EntropyBoundSampler,
}
# The arguments of each sampler, which `generate` takes under the same names.
SAMPLER_ARGUMENTS = {name: tuple(inspect.signature(sampler).parameters) for name, sampler in SAMPLERS.items()}
