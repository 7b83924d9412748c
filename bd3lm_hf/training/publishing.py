"""What `BD3LMTrainer` tells of a run and publishes: the record beside the weights, the model card, the upload."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..data.replacing import move_into, write_text
from ..hub.model_card import create_model_card
from ..hub.published_files import CARD_FILE, STALE_FILES, check_place, check_private, check_repo_id, read_object
from ..hub.publishing import prepare_files, upload
from ..hub.training_summary import EMA_FILE, TrainingSummary, named_in_card


logger = logging.get_logger(__name__)

# Where Trainer's `hub_strategy` "checkpoint" has the last checkpoint.
LAST_CHECKPOINT = "last-checkpoint"
# What a run goes on from, beside the model and Trainer's state. That of a sharded model is in folders.
TRAINING_STATE = (
    OPTIMIZER_NAME,
    "optimizer.bin",
    SCHEDULER_NAME,
    SCALER_NAME,
    "rng_state*.pth",
    EMA_FILE,
    *(f"{folder}_*/{name}" for folder in ("optimizer", "pytorch_model_fsdp") for name in ("*.distcp", ".metadata")),
)


class PublishingMixin:
    """
    To be mixed into a `Trainer`.

    Attributes:
        stated_in_card: What the card tells that no run knows: the arguments of [`create_model_card`] by name.
        base_model_in_card: Id on the Hub of the base, if it was given there.
        loss_in_card: What is minimised in the place of the bound, for a trainer of another loss, and ...
        teacher_name: ... the name or folder of its teacher; None for what the model was before.
    """

    loss_in_card: str | None = None
    teacher_name: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self.stated_in_card: dict[str, Any] = {}
        self.base_model_in_card: str | None = None
        super().__init__(*args, **kwargs)

    def recipe_in_card(self) -> dict[str, Any]:
        """What [`TrainingSummary`] calls the recipe, for a run that has begun."""
        if self.loss_in_card is None:
            return {}
        return {"loss": self.loss_in_card, "teacher": named_in_card(self.teacher_name)}

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        widget_prompts: Sequence[str] | None = None,
        sampler_results: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """
        Writes the model card into `args.output_dir`: what happened in training, the likelihood of the saved weights
        and how to use them. What is told here is remembered, so that `push_to_hub` and `bd3lm push` tell it too.

        Args:
            language: Code(s) of the language(s) of the data.
            license: Identifier of the licence of the weights.
            tags: Further tags.
            model_name: Title. By default the name of the repository, or of the folder.
            finetuned_from: Id on the Hub of the base; by default where the model was loaded from.
            dataset: Name(s) of the training data, or ids on the Hub; by default those that the dataset itself knows.
            widget_prompts: Prompts for the Hub's widget; the first one stands in the card's example.
            sampler_results: Rows of a table of measured samplers: mappings with the same keys.
        """
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "dataset": dataset,
            "widget_prompts": widget_prompts and list(widget_prompts),
            "sampler_results": sampler_results and list(sampler_results),
        }
        self.stated_in_card |= {name: value for name, value in given.items() if value is not None}
        if finetuned_from is not None:
            check_repo_id("finetuned_from", finetuned_from)
            self.base_model_in_card = finetuned_from
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        summary = self.save_summary(output_dir)
        repo_id = self.hub_model_id or self.args.hub_model_id or output_dir.absolute().name
        write_text(output_dir / CARD_FILE, str(create_model_card(summary, repo_id)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As `Trainer.save_model`. The files are moved into the folder after all of them have been written, the
        configuration last, and what an earlier model would have left there goes: shards, or the other of a model and
        an adapter.
        """
        if _internal_call and output_dir is not None:
            # A checkpoint is begun anew, and says itself when it is whole.
            return super().save_model(output_dir, _internal_call)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        # All processes write there.
        new = folder / ".saving"
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super().save_model(str(new), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and new.is_dir():
            move_into(new, folder, STALE_FILES)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        As `Trainer.push_to_hub`, in a single commit, so that no one ever loads half a model, and without state of
        training or pickled files. See [`create_model_card`] for `kwargs`.

        Raises:
            ValueError: an adapter's base is a folder, and `finetuned_from` does not say where on the Hub it is.
            HfHubHTTPError: the Hub refuses.
            ConnectionError: the upload was cut short.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:
                # Trainer of Transformers 5.17 reads it there alone.
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return upload(
            prepare_files(self.args.output_dir, self.hub_model_id),
            self.hub_model_id,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=commit_message,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        As Trainer's, in a single commit, from the checkpoint itself. Trainer would copy its weights into `output_dir`
        and upload that, with whatever lies in it.
        """
        pushes = self.push_in_progress
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and pushes is not None and not pushes.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            files = self._files_of_checkpoint(Path(checkpoint_folder))
        except ValueError as error:
            # What cannot be published is no reason to end the training: `push_to_hub` at its end says so again.
            logger.warning(f"{checkpoint_folder} is not pushed: {error}")
            return
        steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        # Later checkpoints may take the place of this one before it is sent.
        folder = tempfile.mkdtemp(prefix=".push-", dir=self.args.output_dir)
        job = upload(
            _linked(files, Path(folder)),
            self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {progress}",
            run_as_future=True,
        )

        def finish(job: Future) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            if not job.cancelled() and job.exception() is not None:
                logger.warning(f"{checkpoint_folder} was not pushed: {job.exception()}")

        job.add_done_callback(finish)
        if pushes is None or pushes.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            pushes.jobs.append(job)

    def _files_of_checkpoint(self, checkpoint: Path) -> dict[str, Path | bytes]:
        """What of a checkpoint is pushed, by its path in the repository."""
        files, strategy = prepare_files(checkpoint, self.hub_model_id), self.args.hub_strategy
        if strategy == HubStrategy.EVERY_SAVE:
            return files
        name = checkpoint.name if strategy == HubStrategy.ALL_CHECKPOINTS else LAST_CHECKPOINT
        state = files | training_state(checkpoint)
        return files | {f"{name}/{path}": file for path, file in state.items()}

    def save_summary(self, folder: str | Path, is_checkpoint: bool = False) -> TrainingSummary | None:
        """Records what the card of the model saved in `folder` shall tell; a checkpoint has the trained weights."""
        if not self.args.should_save:
            return None
        has_average = self.ema_callback is not None and self.state.global_step > 0
        summary = TrainingSummary.from_trainer(
            self, averaged=has_average and self.args.export_ema and not is_checkpoint
        )
        summary.save(folder)
        return summary


def training_state(checkpoint: str | Path) -> dict[str, Path | bytes]:
    """
    What a checkpoint holds beside the model for training to go on elsewhere, by its path in it: optimizer, scheduler,
    random states, moving average and Trainer's state, of which the best checkpoint's place stays here. The pickled
    arguments stay here, too: they hold paths, and no run reads them again.

    Raises:
        ValueError: a file is a symbolic link that leads out of the checkpoint.
    """
    checkpoint = Path(checkpoint)
    paths = [path for pattern in TRAINING_STATE for path in checkpoint.glob(pattern) if path.is_file()]
    for path in paths:
        check_place(checkpoint, path.relative_to(checkpoint).as_posix())
    files: dict[str, Path | bytes] = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    state = read_object(checkpoint / TRAINER_STATE_NAME) | {"best_model_checkpoint": None}
    files[TRAINER_STATE_NAME] = (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
    check_private({TRAINER_STATE_NAME: files[TRAINER_STATE_NAME]})
    return files


def _linked(files: Mapping[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """The files under names of their own in a folder, where they last as long as it does."""
    linked = dict(files)
    for number, (name, file) in enumerate(files.items()):
        if isinstance(file, Path):
            linked[name] = folder / f"{number}{file.suffix}"
            try:
                os.link(file.resolve(), linked[name])
            except OSError:
                shutil.copy(file, linked[name])
    return linked
