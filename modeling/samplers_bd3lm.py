"""Samplers: given a block that is partly masked, which tokens to reveal now. No sampler knows the model."""

import torch


class Sampler:
    """
    One denoising step asks a sampler three things, in this order: at which masked positions it wants predictions,
    what noise level a time-conditioned network should be told, and which of the predicted tokens are revealed.

    Masks are bool [batch, block_size]. A sampler is made anew for each block.
    """

    # Whether `reveal` reads the confidence, which costs a softmax over the vocabulary.
    needs_confidence = False

    def candidates(self, masked: torch.Tensor) -> torch.Tensor:
        """The masked positions to predict now, bool [batch, block_size]."""
        return masked

    def mask_probability(self, masked: torch.Tensor) -> torch.Tensor:
        """p of each row's block [batch]: by default the fraction of it that is masked."""
        return masked.float().mean(-1)

    def reveal(self, candidates: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """
        The candidates to reveal, bool [batch, block_size]; at least one in each row that has any.

        Args:
            candidates: what `candidates` returned.
            confidence: the model's probability of each candidate's token [batch, block_size], 0 elsewhere.
        """
        raise NotImplementedError


class FirstHittingSampler(Sampler):
    """
    Reveals one uniformly chosen masked token per forward (Zheng et al., arXiv 2409.02908, Alg. 1).

    Exactly the ancestral sampler in the limit of infinitely many steps: the next token to be revealed there is
    uniform among the masked ones whatever the schedule, and the time at which that happens follows p <- p u^(1/n)
    with n masked tokens and u uniform.
    """

    def __init__(self):
        self._mask_probability = None

    def candidates(self, masked: torch.Tensor) -> torch.Tensor:
        lottery = torch.rand(masked.shape, device=masked.device).masked_fill(~masked, -1.0)
        columns = torch.arange(masked.shape[1], device=masked.device)
        return (columns == lottery.argmax(-1, keepdim=True)) & masked

    def mask_probability(self, masked: torch.Tensor) -> torch.Tensor:
        if self._mask_probability is None:
            self._mask_probability = torch.ones(masked.shape[0], device=masked.device)
        num_masked = masked.sum(-1).clamp(min=1)
        uniform = torch.rand(masked.shape[0], device=masked.device)
        self._mask_probability = self._mask_probability * uniform ** (1 / num_masked)
        return self._mask_probability

    def reveal(self, candidates: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        return candidates


class ConfidenceSampler(Sampler):
    """
    Reveals the tokens that the model is surest of (MaskGIT, arXiv 2202.04200; threshold: Fast-dLLM, arXiv 2505.22618).

    Args:
        denoising_steps: with n tokens masked and k steps left, the ceil(n / k) most confident ones are revealed.
        confidence_threshold: instead of that, all tokens above this probability, and at least the most confident one.
    """

    needs_confidence = True

    def __init__(self, denoising_steps: int | None = None, confidence_threshold: float | None = None):
        self.steps_left = denoising_steps
        self.confidence_threshold = confidence_threshold

    def reveal(self, candidates: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        confidence = confidence.masked_fill(~candidates, -1.0)
        rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        if self.confidence_threshold is not None:
            revealed = (confidence > self.confidence_threshold) | (rank == 0)
        else:
            num_masked = candidates.sum(-1, keepdim=True)
            revealed = rank < -(-num_masked // max(self.steps_left, 1))
            self.steps_left -= 1
        return revealed & candidates


SAMPLERS: dict[str, type[Sampler]] = {"first_hitting": FirstHittingSampler, "confidence": ConfidenceSampler}
