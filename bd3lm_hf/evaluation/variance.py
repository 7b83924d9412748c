"""How much the training loss varies with its noise, drawn from one interval of t, and how much its gradient does."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling.configuration_bd3lm import validate_noise_interval
from ..noise.sampler import NoiseSampler
from .block_losses import draw_noise, score_blocks
from .estimate import Estimate, variance_of_blocks
from .mode import evaluation_mode


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
    return variance_of_blocks(loss, loss**2, columns["sequence"])


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
            noise, _ = draw_noise(noise_sampler, config, noise_interval, inputs, seed=(seed, number))
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
