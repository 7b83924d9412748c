"""`ResumingMixin`: a run that was killed at any time goes on as if it had not been."""

import json
import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length
from transformers.utils import logging

from .callbacks import SaveAfterEvaluationCallback
from .checkpoints import (
    check_architecture,
    check_tensors,
    checkpoint_to_resume,
    clear_checkpoint,
    delete_surplus,
    run_of,
    step_of,
    write_manifest,
)
from .runs import Run, on_main_process, record_run, sole_writer


logger = logging.get_logger(__name__)


class ResumingMixin:
    """To be mixed into a `Trainer`, before all that saves."""

    def __init__(self, *args: Any, **kwargs: Any):
        # The run, and the checkpoint that it goes on from and its step.
        self._run, self._checkpoint, self._first_step = Run(), None, 0
        super().__init__(*args, **kwargs)
        self.add_callback(SaveAfterEvaluationCallback())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As `Trainer.train`. With `resume_from_checkpoint=True` the last *whole* checkpoint of the run that was started
        last in `args.output_dir` is taken. One that was being written when the run was killed, or was damaged since,
        is passed over, with a warning. Where the run was at its end already, no step is taken: `training_loss` is NaN.

        Raises:
            ValueError: there is no whole checkpoint, it is of another architecture, or another run is going on in
                `args.output_dir`.
        """
        output_dir = self._get_output_dir(trial)
        with sole_writer(output_dir):
            started = on_main_process(self._start_run, output_dir, resume_from_checkpoint)
            self._run, self._checkpoint, self._first_step = started
            self._begin(self._checkpoint)
            output = super().train(self._checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, without the mean loss of no steps, which Trainer takes for 0."""
        if self._checkpoint is not None and self.state.global_step == self._first_step:
            logs.pop("train_loss", None)
        super().log(logs, *args, **kwargs)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """As `Trainer.save_metrics`, which adds to a file that may have been cut short when the run was killed."""
        path = Path(self.args.output_dir, "all_results.json")
        if combined and self.is_world_process_zero() and path.is_file():
            try:
                is_whole = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
            except ValueError:
                is_whole = False
            if not is_whole:
                logger.warning(f"{path} can't be read, and is begun anew.")
                path.unlink()
        super().save_metrics(split, metrics, combined)

    def _start_run(self, output_dir: str, resume_from_checkpoint: str | bool | None) -> tuple[Run, str | None, int]:
        """The run, which `output_dir` knows from now on, the checkpoint that it goes on from, and the step of that."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir)
        if checkpoint is None:
            run, step = Run.new(), 0
        else:
            self._check_checkpoint(checkpoint)
            step = step_of(checkpoint)
            run = Run.new(run_of(checkpoint), step)
        record_run(output_dir, run)
        return run, checkpoint, step

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises ValueError for what belongs to another model."""
        model = self.accelerator.unwrap_model(self.model)
        check_architecture(checkpoint, model.config)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_tensors(checkpoint, model)

    def _begin(self, checkpoint: str | None) -> None:
        """Called before training, with the checkpoint that it goes on from."""
        if checkpoint is None:
            return
        if not Path(checkpoint, self._rng_state_file).is_file():
            logger.warning(
                f"{checkpoint} has no {self._rng_state_file}, as it was written by another number of processes: the "
                "random numbers of dropout will be others than those of the run so far."
            )
        # Trainer would let them begin anew: the patience of early stopping, for one.
        saved = _state_of(checkpoint).stateful_callbacks
        for callback in self.callback_handler.callbacks:
            states = saved.get(type(callback).__name__, []) if isinstance(callback, ExportableState) else []
            for state in states[-1:] if isinstance(states, list) else [states]:
                vars(callback).update(state["attributes"])

    @property
    def _rng_state_file(self) -> str:
        return f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The epoch to go on with, and the number of its batches that were trained on."""
        position = super()._init_training_state(*args, **kwargs)
        if self._checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return position
        # Trainer takes a stream for so long that it is read once. The epoch tells the share of all batches.
        saved = _state_of(self._checkpoint)
        epoch, share = divmod(saved.epoch, 1)
        return int(epoch), round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer takes a step of each epoch before it asks whether that is one too many.
        if self._is_over():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        """Whether the run was at its end already when the checkpoint was written that it goes on from."""
        return self._checkpoint is not None and (
            self.state.global_step >= self.state.max_steps
            or any(
                callback.early_stopping_patience_counter >= callback.early_stopping_patience
                for callback in self.callback_handler.callbacks
                if isinstance(callback, EarlyStoppingCallback)
            )
        )

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False):
        # With `eval_on_start` a run is evaluated before its first step, and does not begin again when it goes on.
        if skip_scheduler and self._checkpoint is not None:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last that each process writes: the manifest, which says that a checkpoint is whole, comes after all.
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer._save_checkpoint`; the manifest comes last, before older checkpoints are deleted."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            clear_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        state, best, limit = self.state, self.state.best_model_checkpoint, self.args.save_total_limit
        save_to_json = state.save_to_json

        def save_and_complete(path: str) -> None:
            # Trainer looks for a folder of the best step, which may be another run's.
            if state.best_model_checkpoint not in (best, str(folder)):
                writer = run_of(state.best_model_checkpoint)
                if writer is None or not self._run.owns(writer, state.best_global_step):
                    state.best_model_checkpoint = best
            save_to_json(path)
            write_manifest(folder, self._run)
            delete_surplus(folder, self._run, limit, state.best_model_checkpoint)
            # Trainer would go on with whatever else is called so, such as a copy kept as checkpoint-old.
            self.args.save_total_limit = None

        state.save_to_json = save_and_complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
            del state.save_to_json


def _state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
