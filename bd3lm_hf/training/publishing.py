"""What `BD3LMTrainer` tells of a run and publishes: the record beside the weights, the model card, the upload."""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from ..hub.model_card import create_model_card
from ..hub.publishing import CARD_FILE, MODEL_CODE, prepare_files, upload
from ..hub.training_summary import SUMMARY_FILE, TrainingSummary


class PublishingMixin:
    """
    To be mixed into a `Trainer`.

    Attributes:
        stated_in_card: What the card tells that no run knows: the arguments of [`create_model_card`] by name.
        base_model_in_card: Id on the Hub of the base, if it was given there.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.stated_in_card: dict[str, Any] = {}
        self.base_model_in_card: str | None = None
        super().__init__(*args, **kwargs)

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
        self.base_model_in_card = finetuned_from or self.base_model_in_card
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        summary = self.save_summary(output_dir)
        repo_id = self.hub_model_id or self.args.hub_model_id or output_dir.absolute().name
        create_model_card(summary, repo_id).save(output_dir / CARD_FILE)

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
        # Trainer takes the weights alone from the checkpoint, and uploads `output_dir`.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            output_dir = Path(self.args.output_dir)
            code = [source for pattern in MODEL_CODE for source in Path(checkpoint_folder).glob(pattern)]
            for source in [*code, Path(checkpoint_folder, SUMMARY_FILE)]:
                shutil.copy(source, output_dir)
            summary = TrainingSummary.from_folder(checkpoint_folder)
            create_model_card(summary, self.hub_model_id).save(output_dir / CARD_FILE)
        super()._push_from_checkpoint(checkpoint_folder)

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
