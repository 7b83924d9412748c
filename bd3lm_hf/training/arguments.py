"""`BD3LMTrainingArguments`: what `BD3LMTrainer` takes beside the arguments of Transformers' Trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..modeling.configuration_bd3lm import NOISE_SCHEDULE_NAMES, validate_noise_interval
from ..noise.sampler import MASKING_NAMES


@dataclass
class BD3LMTrainingArguments(TrainingArguments):
    """
    `TrainingArguments`, and the block diffusion recipe (arXiv 2503.09573).

    Args:
        noise_schedule: Train under this schedule in place of the model's: loglinear, square, square_root, log or
            cosine.
        noise_interval: (beta, omega) that t is drawn from, 0 <= beta <= omega <= 1, in place of the model's. Unless
            `fix_noise_interval` is set it is where the search starts from.
        fix_noise_interval: Keep the interval; otherwise evaluations during training choose it from data: the one of
            least NELBO variance, used from the next step on and saved in the configuration.
        noise_interval_search_every: Choose at every so many evaluations.
        antithetic_sampling: Deal one stratum of [0, 1) to each block of the batch, over all processes and accumulated
            batches, rather than drawing independently.
        masking: "bernoulli" masks each token of a block with probability p(t); "exact_count" draws the number of
            masked tokens, at least one, stratified: the same mean of the loss.
        num_noise_samples: Noised copies of each sequence, which share one clean stream.
        complementary_masks: With two copies, the second masks what the first does not: each token is predicted once.
        block_size_schedule: Block sizes from given steps on, as "STEP:SIZE" strings or a dict: 0:1024 5000:16 trains
            at block size 1024 first and at 16 after 5000 steps.
        ema_decay: Decay of the moving average of the weights, in [0, 1); 0 turns it off. Evaluation takes the average.
            It is saved with each checkpoint.
        export_ema: Leave the model with the averaged weights at the end of training, and save them by `save_model`.

    Raises:
        ValueError: an argument outside its range, named with what it got and what it takes.
    """

    noise_schedule: str | None = field(
        default=None,
        metadata={"help": "Train under this noise schedule. (default: the model's)", "choices": NOISE_SCHEDULE_NAMES},
    )
    noise_interval: list[float] | None = field(
        default=None, metadata={"help": "Two numbers: the interval that t is drawn from. (default: the model's)"}
    )
    fix_noise_interval: bool = field(
        default=False, metadata={"help": "Keep the noise interval; otherwise evaluations choose it."}
    )
    noise_interval_search_every: int = field(
        default=1, metadata={"help": "Choose the noise interval at every so many evaluations."}
    )
    antithetic_sampling: bool = field(
        default=True, metadata={"help": "Stratify the noise levels over the blocks of the whole batch."}
    )
    masking: str = field(
        default="bernoulli",
        metadata={
            "help": "Mask each token by itself (bernoulli), or a stratified number of each block's (exact_count).",
            "choices": MASKING_NAMES,
        },
    )
    num_noise_samples: int = field(
        default=1, metadata={"help": "Noised copies of each sequence, which share one clean stream."}
    )
    complementary_masks: bool = field(
        default=False, metadata={"help": "Of two copies, the second masks what the first does not."}
    )
    block_size_schedule: list[str] | None = field(
        default=None, metadata={"help": "Block sizes from given steps on, e.g. 0:1024 5000:16."}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the weights' moving average; 0: none."})
    export_ema: bool = field(default=True, metadata={"help": "Leave the model with the averaged weights at the end."})

    def __post_init__(self):
        if self.greater_is_better is None:
            # Trainer would take the greatest of any `metric_for_best_model` that is not called a loss.
            self.greater_is_better = False
        super().__post_init__()
        if self.noise_schedule is not None and self.noise_schedule not in NOISE_SCHEDULE_NAMES:
            raise ValueError(
                f"`noise_schedule` must be one of {', '.join(NOISE_SCHEDULE_NAMES)}, but got {self.noise_schedule!r}."
            )
        if self.noise_interval is not None:
            self.noise_interval = tuple(self.noise_interval)
            validate_noise_interval(self.noise_interval)
        if self.noise_interval_search_every < 1:
            raise ValueError(
                f"`noise_interval_search_every` must be at least 1, but got {self.noise_interval_search_every}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), but got {self.ema_decay}.")
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0: the bound on the likelihood has no smoothed labels, but got "
                f"{self.label_smoothing_factor}."
            )
        # Evaluation gathers the losses of all blocks, from which its metrics come.
        for name, value in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` must be {value}: BD3LMTrainer evaluates the losses of all batches together, but got "
                    f"{getattr(self, name)}."
                )
        self.block_size_schedule = _read_block_size_schedule(self.block_size_schedule)


def _read_block_size_schedule(schedule: dict[int, int] | list[str] | None) -> dict[int, int] | None:
    if schedule is None:
        return None
    items = schedule.items() if isinstance(schedule, dict) else (item.split(":") for item in schedule)
    try:
        read = {int(step): int(size) for step, size in items}
    except ValueError as error:
        raise ValueError(f"`block_size_schedule` takes STEP:SIZE entries, but got {schedule}.") from error
    if not read or min(read) < 0 or min(read.values()) < 1:
        raise ValueError(f"`block_size_schedule` takes steps >= 0 and sizes >= 1, but got {schedule}.")
    return dict(sorted(read.items()))
