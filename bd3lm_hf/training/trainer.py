"""`BD3LMTrainer`: Transformers' Trainer with the block diffusion recipe."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.collators import BD3LMDataCollator
from ..data.tokenization import token_byte_counts
from ..evaluation.block_losses import BlockLosses, block_statistics, predicted_blocks
from ..evaluation.networks import is_block_diffusion, stock_config
from ..hub.training_summary import SUMMARY_FILE, TrainingSummary
from ..kernels.compiled import step_of, unwrapped
from ..modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL
from ..modeling.two_stream_block_diffusion import TextBlocks
from ..noise.sampler import Noise, NoiseSampler
from .arguments import BD3LMTrainingArguments
from .callbacks import BlockSizeCallback, CompiledStepCallback, EMACallback, MaskTokenCallback, NoiseIntervalCallback
from .checkpoints import own_class
from .checks import check_dataset, check_eval_dataset, check_fsdp_plugin
from .divergence import confident
from .ema import check_saved_average
from .publishing import PublishingMixin
from .resuming import ResumingMixin


# The noise of training and that of evaluation are drawn from seeds of their own.
TRAINING_NOISE, EVALUATION_NOISE = 0, 1
# So many rows of a stream that is evaluated share their strata.
STREAMED_ROWS = 1024
# What a batch may hold beside `input_ids` that says which tokens are read, and which are predicted.
TEXT_INPUTS = ("labels", "attention_mask", "position_ids", "document_ids")


class BD3LMTrainer(ResumingMixin, PublishingMixin, Trainer):
    """
    Trains block diffusion language models (arXiv 2503.09573) as `Trainer` trains any other.

    The noise of a step is a function of the seed, the step and the number of the row in the whole batch, so that a
    resumed run, an accumulated batch or several processes meet the noise that one uninterrupted process would.

    Evaluation is by likelihood: `eval_nelbo` (nats per token, the bound on the full interval of t; equal to
    `eval_loss`), its `eval_nelbo_standard_error` over sequences, `eval_perplexity`, `eval_bits_per_byte` where the
    tokenizer's tokens can be counted in bytes, and `eval_nelbo_variance`, that of a block's estimate under the noise
    interval in force. The noise of evaluation depends on `args.seed` alone.

    Args:
        model: A block diffusion language model of any network (`BD3LMForMaskedLM`, `BlockDiffusionForMaskedLM`), or a
            `PeftModel` around one.
        args: [`BD3LMTrainingArguments`].
        data_collator: Makes batches of `input_ids` and, optionally, `labels`, `attention_mask`, `position_ids` and
            `document_ids`. By default a [`BD3LMDataCollator`].
        train_dataset, eval_dataset, kwargs: As `Trainer` takes them.

    Raises:
        ValueError: what can't be trained with, found before the first step: arguments outside their range, a model
            of another kind, a dataset without `input_ids`, labels of another length, sequences shorter than a block,
            an evaluation set smaller than one batch.
    """

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, **kwargs):
        args = BD3LMTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, BD3LMTrainingArguments):
            raise ValueError(f"`args` must be BD3LMTrainingArguments, but got {type(args).__name__}.")
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None: a block diffusion model has no logits of whole texts, and BD3LMTrainer "
                    "evaluates by likelihood."
                )
        # `model_init` is called before Trainer has its arguments.
        self.args = args
        if model is not None:
            self._check_and_configure(model)
        self.noise_sampler = NoiseSampler(
            args.antithetic_sampling,
            args.masking,
            args.num_noise_samples,
            args.complementary_masks,
            args.noise_level_per,
            args.loss_weight,
        )
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._configure(self.config, args)
        if data_collator is None:
            self.data_collator = BD3LMDataCollator(self.config.pad_token_id or 0, self.config.ignore_bos)
        self.noise_sampler.validate(self.config)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_fsdp_plugin(plugin, self.config)
            if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
                # accelerate has it round what goes into the model and out of it: the weights of the loss, the loss.
                plugin.mixed_precision_policy = replace(
                    plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None
                )
        # A block size by schedule comes into force with the first step.
        block_sizes = (args.block_size_schedule or {0: self.config.block_size}).values()
        for name, dataset in _named("train_dataset", train_dataset) + _named("eval_dataset", eval_dataset):
            check_dataset(name, dataset, max(block_sizes))
        for name, dataset in _named("eval_dataset", eval_dataset):
            check_eval_dataset(name, dataset, args)

        self.ema_callback = EMACallback(args.ema_decay, args.export_ema) if args.ema_decay else None
        callbacks = [
            # Before the average of the weights is taken.
            None if args.mask_token_learning_rate is None else MaskTokenCallback(self.config.mask_token_id),
            self.ema_callback,
            NoiseIntervalCallback() if args.searches_noise_interval else None,
            BlockSizeCallback(args.block_size_schedule) if args.block_size_schedule else None,
            CompiledStepCallback() if args.compiles_step else None,
        ]
        for callback in filter(None, callbacks):
            self.add_callback(callback)
        # What was evaluated before training, whose log begins anew.
        self.history_before: list[dict[str, float]] = []
        # The batches of the step at hand that have met their noise, and the evaluated ones.
        self._noised_step, self._noised_batches = None, 0
        self._evaluated_batches, self._num_new_tokens = 0, 0
        self._token_bytes = None if self.processing_class is None else token_byte_counts(self.processing_class)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, whatever is wrapped around the model."""
        return self.accelerator.unwrap_model(self.model).config

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`: the new model of a run, with the noise that the arguments ask for."""
        model = super().call_model_init(trial)
        self._check_and_configure(model)
        return model

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args: Any, **kwargs: Any):
        """As `Trainer.hyperparameter_search`; the default objective is `eval_nelbo`, of the first evaluation set."""
        return super().hyperparameter_search(hp_space, compute_objective or first_nelbo, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; accelerate compiles nothing where the training step is compiled."""
        backend = self.args.torch_compile_backend
        self.args.torch_compile_backend = None if self.args.compiles_step else backend
        super().create_accelerator_and_postprocess()
        self.args.torch_compile_backend = backend

    def _check_and_configure(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if not is_block_diffusion(config):
            raise ValueError(
                "`model` must be a BD3LMForMaskedLM or a PeftModel around one, or the same of a "
                f"BlockDiffusionForMaskedLM, but got {type(model).__name__}."
            )
        self._configure(config, self.args)

    @staticmethod
    def _configure(config: PreTrainedConfig, args: BD3LMTrainingArguments) -> None:
        for name in ("noise_schedule", "noise_interval"):
            if getattr(args, name) is not None:
                setattr(config, name, getattr(args, name))
        if stock_config(config) is not None:
            config.clean_attention = args.clean_attention or config.clean_attention
        elif args.clean_attention not in (None, "block"):
            raise ValueError(
                f"`clean_attention` must be 'block' for a {config.model_type!r}, which was no autoregressive model, "
                f"but got {args.clean_attention!r}."
            )
        if args.autoregressive_loss_weight and config.clean_attention != "causal":
            raise ValueError(
                "`autoregressive_loss_weight` takes `clean_attention` 'causal', as a clean token that sees its whole "
                f"block sees the next one, but got {args.autoregressive_loss_weight} with {config.clean_attention!r}."
            )
        for block_size in (args.block_size_schedule or {}).values():
            if block_size > (config.max_position_embeddings or block_size):
                raise ValueError(
                    "`block_size_schedule` takes block sizes up to the model's `max_position_embeddings` "
                    f"({config.max_position_embeddings}), but got {block_size}."
                )
        config.validate()

    def _check_checkpoint(self, checkpoint: str) -> None:
        super()._check_checkpoint(checkpoint)
        if self.ema_callback is not None:
            check_saved_average(checkpoint)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        if self.ema_callback is not None:
            self.ema_callback.resume_from = checkpoint
        # A run that was stopped within a step had met a part of its noise.
        self._noised_step = None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As `Trainer.get_batch_samples`, after -100 was set as the label of each token that is not predicted."""
        labelled = map(self._with_labels, epoch_iterator)
        batches, num_items = super().get_batch_samples(labelled, num_batches, device)
        # On its device: to read it here would be to wait for the step before.
        self._num_new_tokens = self._num_new_tokens + (0 if num_items is None else num_items)
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """
        As `Trainer.compute_loss`: the loss under the noise of this step, in nats per predicted token of the whole
        batch.
        """
        if self._noised_step != self.state.global_step:
            self._noised_step, self._noised_batches = self.state.global_step, 0
        batch_size = self._train_batch_size
        noise = self._draw_noise(
            inputs,
            self.noise_sampler,
            self.config.noise_interval,
            first_row=(self._noised_batches * self.args.world_size + self.args.process_index) * batch_size,
            num_rows=batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            seed=(self.args.seed, TRAINING_NOISE, self.state.global_step),
        )
        self._noised_batches += 1
        inputs = {**inputs, **noise.inputs(inputs["input_ids"])}
        if self.args.autoregressive_loss_weight:
            inputs["autoregressive_loss_weight"] = self.args.autoregressive_loss_weight
        if step_of(model) is not None:
            inputs["num_masked"] = noise.num_masked
        with confident(unwrapped(model), self.args.confidence_loss_weight):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, with the metrics that stand in the description of this class."""
        with self._averaged_weights():
            metrics = super().evaluate(*args, **kwargs)
        if not self.state.global_step:
            self.history_before = list(self.state.log_history)
        if not self.is_in_train and self.state.global_step and Path(self.args.output_dir, SUMMARY_FILE).is_file():
            # What is found out about the saved weights belongs to their card.
            self.save_summary(self.args.output_dir)
        return metrics

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; while training it also chooses the noise interval, where that is due."""
        self._evaluated_batches = 0
        self._num_evaluated_rows = self.num_examples(dataloader) if has_length(dataloader) else STREAMED_ROWS
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        columns = predicted_blocks(output.predictions)
        losses, num_bytes = BlockLosses.of_columns(columns, self.config.noise_schedule), columns["num_bytes"].sum()
        if self.is_in_train and self.args.searches_noise_interval and self._search_is_due(metric_key_prefix):
            self._choose_noise_interval(losses)
        likelihood = losses.nelbo()
        metrics = {
            "loss": likelihood.value,
            "nelbo": likelihood.value,
            "nelbo_standard_error": likelihood.standard_error,
            # Infinite for a model that diverged.
            "perplexity": np.exp(likelihood.value),
            "nelbo_variance": losses.variance(self.config.noise_interval, self.args.masking).value,
        }
        if num_bytes:
            metrics["bits_per_byte"] = likelihood.value * losses.num_tokens.sum() / math.log(2) / num_bytes
        output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in metrics.items()})
        return output._replace(predictions=None)

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        """
        Scores one batch under noise from the full interval.

        Returns:
            (None, what [`block_statistics`] returns [batch, blocks, 5], None).
        """
        inputs = self._with_labels(self._prepare_inputs(inputs))
        batch_size = self.args.eval_batch_size
        noise = self._draw_noise(
            inputs,
            BlockLosses.noise_sampler(self.config),
            FULL_NOISE_INTERVAL,
            first_row=(self._evaluated_batches * self.args.world_size + self.args.process_index) * batch_size,
            num_rows=self._num_evaluated_rows,
            seed=(self.args.seed, EVALUATION_NOISE),
        )
        self._evaluated_batches += 1
        with self.compute_loss_context_manager():
            statistics = block_statistics(
                model, inputs, noise, self._text_blocks(inputs), token_bytes=self._token_bytes
            )
        return None, statistics, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`: the averaged weights, beside the trained ones in a checkpoint of training."""
        is_checkpoint = _internal_call and output_dir is not None
        if not is_checkpoint:
            weights = self._averaged_weights() if self.args.export_ema else contextlib.nullcontext()
            with weights, own_class(self.model):
                super().save_model(output_dir, _internal_call)
            return self.save_summary(output_dir or self.args.output_dir)
        with own_class(self.model):
            super().save_model(output_dir, _internal_call)
        if self.ema_callback is not None and self.ema_callback.weights is not None:
            self.ema_callback.weights.save(output_dir, self.args.should_save)
        self.save_summary(output_dir, is_checkpoint=True)

    def save_summary(self, folder: str | Path, is_checkpoint: bool = False) -> TrainingSummary | None:
        """
        As `PublishingMixin.save_summary`, of the model in a `folder`, which may be a checkpoint (`is_checkpoint`); the
        number of predicted tokens goes into the state, too.
        """
        if self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen += int(self._num_new_tokens)
        self._num_new_tokens = 0
        return super().save_summary(folder, is_checkpoint)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        weights = None if self.ema_callback is None else self.ema_callback.weights
        if weights is None or weights.is_applied:
            yield
        else:
            with weights.applied():
                yield

    def _text_blocks(self, inputs: dict[str, torch.Tensor]) -> TextBlocks:
        text = {name: inputs[name] for name in TEXT_INPUTS if inputs.get(name) is not None}
        return TextBlocks.of_batch(self.config, inputs["input_ids"], **text)

    def _with_labels(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with -100 as the label of each token that is not predicted; `Trainer` counts the others."""
        inputs = {"labels": inputs["input_ids"], **inputs}
        inputs["labels"] = inputs["labels"].masked_fill(~self._text_blocks(inputs).predicted, -100)
        return inputs

    def _draw_noise(
        self, inputs: dict[str, torch.Tensor], sampler: NoiseSampler, noise_interval, first_row: int, **kwargs: Any
    ) -> Noise:
        x_0 = inputs["input_ids"]
        rows = range(first_row, first_row + len(x_0))
        return sampler.draw(self.config, noise_interval, x_0, self._text_blocks(inputs), rows, **kwargs)

    def _search_is_due(self, metric_key_prefix: str) -> bool:
        """Counts the evaluations in the log, which a resumed run goes on with."""
        num_evaluations = sum(f"{metric_key_prefix}_nelbo" in entry for entry in self.state.log_history)
        is_first_of_several = not isinstance(self.eval_dataset, dict) or metric_key_prefix == (
            f"eval_{next(iter(self.eval_dataset))}"
        )
        return is_first_of_several and num_evaluations % self.args.noise_interval_search_every == 0

    def _choose_noise_interval(self, losses: BlockLosses) -> None:
        """All processes hold the same statistics, so all choose the same."""
        interval, variances = losses.least_variance_interval(self.args.masking)
        self.config.noise_interval = interval
        self.log(
            {
                "noise_interval_beta": interval[0],
                "noise_interval_omega": interval[1],
                "nelbo_variance": variances[interval].value,
                "nelbo_variance_of_full_interval": variances[FULL_NOISE_INTERVAL].value,
            }
        )


def first_nelbo(metrics: dict[str, float]) -> float:
    """The NELBO among the metrics of an evaluation, in nats per token; of several sets that of the first."""
    return next(value for name, value in metrics.items() if name.endswith("_nelbo"))


def _named(name: str, dataset) -> list[tuple[str, Any]]:
    """A dataset, or each of a dict of them, with the name that an error should give it."""
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [] if dataset is None else [(name, dataset)]
