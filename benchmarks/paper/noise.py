"""How much the noise of training varies under several intervals or schedules, for one model and the same batches."""

from collections.abc import Iterable

from bd3lm_hf import BD3LMDataCollator, NoiseSampler
from bd3lm_hf.evaluation.block_losses import BlockLosses
from bd3lm_hf.evaluation.variance import gradient_variance

from .workbench import Arm, Workbench


def variances(bench: Workbench, model, arms: Iterable[Arm], seed: int) -> dict:
    """Of each arm, by its name: `nelbo`, of a block's estimate, and `gradient`, of a training batch."""
    scale, tokenizer = bench.scale, bench.tokenizer
    rows = bench.train_sequences.shuffled(seed=1000 + seed)
    collate = BD3LMDataCollator(tokenizer.pad_token_id)
    size = scale.batch_size
    batches = [
        collate([rows[number] for number in range(start, start + size)])
        for start in range(0, min(scale.num_gradients * size, len(rows) - size + 1), size)
    ]
    found = {}
    for arm in arms:
        model.config.noise_schedule = arm.noise_schedule
        sampler = NoiseSampler(arm.antithetic, arm.masking)
        losses = BlockLosses.of_sequences(
            model, bench.held_out_sequences, batch_size=32, num_draws=scale.num_draws, seed=seed, progress=False
        )
        gradient = gradient_variance(
            model, batches, arm.noise_interval, noise_sampler=sampler, seed=seed, progress=False
        )
        found[arm.name] = {"nelbo": losses.variance(arm.noise_interval, arm.masking).value, "gradient": gradient.value}
    return found
