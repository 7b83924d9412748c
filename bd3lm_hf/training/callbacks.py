"""What happens around the steps of `BD3LMTrainer`: moving average, chosen noise interval, scheduled block sizes."""

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
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
    """
    Restores the interval that was in force at a checkpoint: the last evaluation's choice, which stands in the log, or
    the one that the run began with.
    """

    def __init__(self):
        self.first: tuple[float, float] | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        chosen = chosen_noise_intervals(state.log_history)
        if self.first is None or state.global_step == 0:
            self.first = model.config.noise_interval
        model.config.noise_interval = chosen[-1] if chosen else self.first


class BlockSizeCallback(TrainerCallback):
    """
    Sets the block size by a schedule {step: block size}; before its first entry that which the run began with is in
    force.
    """

    def __init__(self, schedule: dict[int, int]):
        self.schedule = schedule
        self.first: int | None = None

    def block_size(self, step: int) -> int | None:
        """The block size at a step, None if it is not known."""
        sizes = [size for start, size in self.schedule.items() if start <= step]
        return sizes[-1] if sizes else self.first

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.first is None or state.global_step == 0:
            self.first = model.config.block_size
        # That of the last step is in force until the next one, if there is a next one.
        self._set(max(state.global_step - 1, 0), state, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._set(state.global_step, state, model)

    def _set(self, step: int, state, model) -> None:
        block_size = self.block_size(step)
        if block_size != model.config.block_size:
            if state.is_world_process_zero:
                logger.warning(
                    f"Block size {model.config.block_size} -> {block_size} at step {step}, as `block_size_schedule` "
                    "says."
                )
            model.config.block_size = block_size


class SaveAfterEvaluationCallback(TrainerCallback):
    """
    Where an epoch ends with an evaluation, has the checkpoint that is due after its last step written after the
    evaluation: a run that goes on from it would miss it, and the noise interval that it chooses.
    """

    def __init__(self):
        self.is_due = False

    def on_step_end(self, args, state, control, **kwargs):
        is_last = float(state.epoch).is_integer() or control.should_epoch_stop or control.should_training_stop
        self.is_due = is_last and control.should_save and args.eval_strategy == IntervalStrategy.EPOCH
        control.should_save &= not self.is_due

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.is_due
        self.is_due = False
