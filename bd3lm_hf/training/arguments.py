"""`BD3LMTrainingArguments`: what `BD3LMTrainer` takes beside the arguments of Transformers' Trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..modeling.configuration_bd3lm import NOISE_SCHEDULE_NAMES, validate_noise_interval
from ..noise.sampler import LOSS_WEIGHT_NAMES, MASKING_NAMES, NOISE_LEVEL_NAMES


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
        complementary_masks: With two copies, the second masks what the first does not: each token is predicted once
            (Fast-dLLM v2, arXiv 2509.26328).
        noise_level_per: What shares a t: "block" (BD3-LM), "row" (dLLM's A2D) or "document" (SDAR, arXiv 2510.06303).
        loss_weight: "nelbo" weighs masked tokens by w(t), for the bound on the likelihood (BD3-LM, SDAR, A2D).
            "uniform" weighs each by 1 (Fast-dLLM v2); the noise interval, which is chosen for the bound, is kept then.
            What evaluation reports is the bound, whichever is trained.
        autoregressive_loss_weight: Times this much of -log p of the next token, which the clean stream scores, is
            added to the loss (TiDAR, arXiv 2511.08923). Needs a network with `clean_attention` "causal".
        confidence_loss_weight: Where the likeliest prediction of a masked token is right, so much of its entropy is
            added to its -log p, so that more tokens are sure enough to be revealed together (CAP; LLaDA2.0, arXiv
            2512.15745). Trains without the compiled step.
        clean_attention: Train with this in place of the model's: "block" (BD3-LM, SDAR, Fast-dLLM v2), or "causal"
            (TiDAR), which keeps the autoregressive model that the network came from beside the diffusion model.
        mask_token_learning_rate: Learning rate of the mask token's embedding, which a new token has to learn from
            nothing, in place of `learning_rate`; it follows the same schedule. Ours.
        block_size_schedule: Block sizes from given steps on, as "STEP:SIZE" strings or a dict: 0:1024 5000:16 trains
            at block size 1024 first and at 16 after 5000 steps; 0:1 500:2 1000:4 leads an autoregressive model to
            larger blocks (LLaDA2.0, arXiv 2512.15745). The optimizer goes on.
        ema_decay: Decay of the moving average of the weights, in [0, 1); 0 turns it off. Evaluation takes the average.
            It is saved with each checkpoint.
        export_ema: Leave the model with the averaged weights at the end of training, and save them by `save_model`.
        torch_compile: On an accelerator None (the default) and True train by one static graph
            (`bd3lm_hf.kernels.compiled`), with `torch_compile_backend` and `torch_compile_mode`; False does not. On a
            CPU True compiles the model as Transformers does.

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
        default=False, metadata={"help": "Of two copies, the second masks what the first does not (Fast-dLLM v2)."}
    )
    noise_level_per: str = field(
        default="block",
        metadata={
            "help": "What shares a noise level: each block has its own (BD3-LM), a row (dLLM's A2D) or a document "
            "(SDAR).",
            "choices": NOISE_LEVEL_NAMES,
        },
    )
    loss_weight: str = field(
        default="nelbo",
        metadata={
            "help": "Weigh masked tokens as the bound on the likelihood does (nelbo: BD3-LM, SDAR, A2D) or all alike "
            "(uniform: Fast-dLLM v2). The likelihood that is reported is the bound.",
            "choices": LOSS_WEIGHT_NAMES,
        },
    )
    autoregressive_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Add so much of the next-token loss of the clean stream (TiDAR); needs clean_attention causal."
        },
    )
    confidence_loss_weight: float = field(
        default=0.0, metadata={"help": "Add so much of the entropy of predictions that are right (CAP of LLaDA2.0)."}
    )
    clean_attention: str | None = field(
        default=None,
        metadata={
            "help": "What a clean token sees: its block (BD3-LM, SDAR, Fast-dLLM v2), or what comes before it "
            "(causal: TiDAR). (default: the model's)",
            "choices": ["block", "causal"],
        },
    )
    mask_token_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the mask token's embedding. (default: that of all others)"},
    )
    block_size_schedule: list[str] | None = field(
        default=None,
        metadata={"help": "Block sizes from given steps on, e.g. 0:1024 5000:16 or, as LLaDA2.0, 0:1 500:4."},
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the weights' moving average; 0: none."})
    export_ema: bool = field(default=True, metadata={"help": "Leave the model with the averaged weights at the end."})
    # Of three values, though None is no bool: for nothing else do command lines take a flag without a value.
    torch_compile: bool = field(
        default=None,
        metadata={"help": "Compile the training step. (default: on an accelerator, as one static graph)"},
    )

    def __post_init__(self):
        if self.greater_is_better is None:
            # Trainer would take the greatest of any `metric_for_best_model` that is not called a loss.
            self.greater_is_better = False
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be at least 1, but got {self.gradient_accumulation_steps}."
            )
        if self.confidence_loss_weight < 0:
            raise ValueError(f"`confidence_loss_weight` must be at least 0, but got {self.confidence_loss_weight}.")
        if self.confidence_loss_weight:
            if self.torch_compile:
                raise ValueError("`torch_compile` must be False with `confidence_loss_weight`, but got True.")
            self.torch_compile = False
        asked = self.torch_compile
        super().__post_init__()
        if asked is not False and self.device.type != "cpu":
            # Nothing that Transformers is to do.
            self.torch_compile = None
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
        if self.autoregressive_loss_weight < 0:
            raise ValueError(
                f"`autoregressive_loss_weight` must be at least 0, but got {self.autoregressive_loss_weight}."
            )
        rate = self.mask_token_learning_rate
        if rate is not None and (rate < 0 or self.learning_rate <= 0):
            raise ValueError(
                f"`mask_token_learning_rate` must be at least 0, and `learning_rate` above, but got {rate} and "
                f"{self.learning_rate}."
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

    @property
    def compiles_step(self) -> bool:
        """Whether training goes by the static graph of `bd3lm_hf.kernels.compiled`."""
        return self.torch_compile is None and self.device.type != "cpu"

    @property
    def searches_noise_interval(self) -> bool:
        """Whether evaluations during training choose the noise interval: the one that suits the bound."""
        return not self.fix_noise_interval and self.loss_weight == "nelbo"


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
