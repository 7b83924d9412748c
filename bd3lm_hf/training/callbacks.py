"""What happens around the steps of `BD3LMTrainer`: moving average, chosen noise interval, scheduled block sizes."""

from transformers import TrainerCallback
from transformers.utils import logging

from ..noise.intervals import chosen_noise_intervals
from .ema import AveragedWeights


logger = logging.get_logger(__name__)


class EMACallback(TrainerCallback):
    """
    Keeps the moving average of the weights.

    Attributes:
        decay: See [`AveragedWeights`].
        export: Whether the model has the averaged weights after training.
        resume_from: The checkpoint folder whose average training goes on with.
        weights: The average while training, None before and after.
    """

    def __init__(self, decay: float, export: bool):
        self.decay = decay
        self.export = export
        self.resume_from: str | None = None
        self.weights: AveragedWeights | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = AveragedWeights(model, self.decay)
        if self.resume_from is not None:
            self.weights.load(self.resume_from)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.weights.update()

    def on_train_end(self, args, state, control, **kwargs):
        if self.export:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self.weights.load(state.best_model_checkpoint)
            self.weights.copy_to_model()
        self.weights = None


class NoiseIntervalCallback(TrainerCallback):
    """Restores the interval that the last evaluation chose: it stands in the log, which a checkpoint holds."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        chosen = chosen_noise_intervals(state.log_history)
        if chosen:
            model.config.noise_interval = chosen[-1]


class BlockSizeCallback(TrainerCallback):
    """Sets the block size by a schedule {step: block size}."""

    def __init__(self, schedule: dict[int, int]):
        self.schedule = schedule

    def block_size(self, step: int) -> int | None:
        """The block size at a step, None before the first entry."""
        sizes = [size for start, size in self.schedule.items() if start <= step]
        return sizes[-1] if sizes else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_begin(args, state, control, model=model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        block_size = self.block_size(state.global_step)
        if block_size is not None and block_size != model.config.block_size:
            if state.is_world_process_zero:
                logger.warning(
                    f"Block size {model.config.block_size} -> {block_size} at step {state.global_step}, as "
                    "`block_size_schedule` says."
                )
            model.config.block_size = block_size
