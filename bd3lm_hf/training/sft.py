"""`BD3LMSFTTrainer`: TRL's supervised fine-tuning, with the block diffusion loss."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..data.collators import BD3LMDataCollator
from ..evaluation.loading import load_whole
from .resuming import ResumingMixin


try:
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except ImportError as error:
    raise ImportError("`bd3lm_hf.training.sft` needs TRL: pip install 'bd3lm-hf[trl]'") from error


# The values that a training argument may have, by its name, and why it may have no other.
ALLOWED_ARGUMENTS = {
    "loss_type": (("nll",), "the loss is the bound on the likelihood of block diffusion"),
    "label_smoothing_factor": ((0,), "the bound on the likelihood has no smoothed labels"),
    "router_aux_loss_coef": ((None, 0), "the loss has no part for a router of experts"),
    "use_liger_kernel": ((False,), "Liger's kernels are made for next-token losses"),
    "padding_free": ((False,), "its flat batches need attention of variable lengths; take `packing=True`"),
    "packing_strategy": (
        ("bfd", "bfd_split"),
        "the texts of a row must not see each other; for rows cut from one stream of text take `pack_documents`",
    ),
    "truncation_mode": (("keep_start",), "a text is conditioned on how it starts"),
    "batch_eval_metrics": ((False,), "there are no logits to compute metrics of"),
    "eval_do_concat_batches": ((True,), "the likelihood is that of all batches together"),
}
# Arguments of the trainer that would read logits, or make batches for a next-token loss.
REFUSED = {
    "compute_loss_func": "the loss is computed in the model; a subclass overrides `compute_loss`",
    "compute_metrics": "there are no logits of whole texts; the trainer evaluates by likelihood",
    "preprocess_logits_for_metrics": "there are no logits of whole texts; the trainer evaluates by likelihood",
    "data_collator": "batches are made by a BD3LMDataCollator, from columns `input_ids` and `labels`",
}
# The columns of tokenized text that say something of each token.
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "document_ids")


class BD3LMSFTTrainer(ResumingMixin, SFTTrainer):
    """
    TRL's `SFTTrainer` for block diffusion language models (arXiv 2503.09573).

    Datasets, chat templates, packing, PEFT and arguments are TRL's; the loss is the model's own. A label of -100 (a
    prompt, another turn than the assistant's) is neither masked nor predicted, and is read by all that comes after.
    With `packing`, the texts of a row do not see each other. A dataset that `prepare_finetuning` or `pack_examples`
    has made is taken as it is.

    Evaluation is by likelihood: `eval_nelbo` (nats per predicted token, the bound on the full interval of t; equal to
    `eval_loss`) and `eval_perplexity`. The same text meets the same noise at each evaluation.

    Args:
        model: A block diffusion model, a `PeftModel` around one, or the folder or id on the Hub of one, which is
            loaded as `AutoModelForMaskedLM` does, with `args.model_init_kwargs`.
        args: `trl.SFTConfig`.
        data_collator: None.
        train_dataset, eval_dataset, processing_class: As `SFTTrainer` takes them.
        quantization_config: For a model that is loaded here.
        peft_config: The adapter to train. Without a `task_type` it is saved as one of a causal language model, which
            makes texts as this one does.
        kwargs: As `SFTTrainer` takes them.

    Raises:
        ValueError: a model of another kind; an argument that has no meaning for this loss, named with what it got and
            what it takes.
    """

    # The last tells the model that this trainer's loss is its own.
    _tag_names = ["trl", "sft", "block-diffusion"]

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        quantization_config=None,
        peft_config=None,
        **kwargs: Any,
    ):
        _check_arguments(args, {**kwargs, "data_collator": data_collator}, processing_class)
        if isinstance(model, str):
            model, processing_class = _load(model, args, processing_class, quantization_config)
            quantization_config = None
        _check_model(model, peft_config)
        if peft_config is not None and peft_config.task_type is None:
            peft_config = copy.copy(peft_config)
            peft_config.task_type = "CAUSAL_LM"
        with _forward_kept(model), _no_model_init_kwargs(args):
            super().__init__(
                model,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **kwargs,
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "`parallelism_config` must not share out the tokens of a sequence, each of which sees tokens before "
                f"and after it, but got {parallelism}."
            )
        # TRL's own flattens packed rows into one, which takes attention over all of its tokens.
        self.padding_free = False
        self.data_collator = SFTDataCollator(
            pad_token_id=self.data_collator.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            ignore_bos=model.config.ignore_bos,
        )
        # Trainer counts the predicted tokens by their labels.
        self._loss_shifts_labels = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """As `Trainer.compute_loss`: the model's loss, in nats per predicted token of the whole batch."""
        if num_items_in_batch is not None:
            # Texts may be so short that nothing of them is predicted.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        """
        Scores one batch under the noise that the model draws for its texts in evaluation.

        Returns:
            (None, the nats and the number of predicted tokens of each row [batch, 2], None).
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nelbo = model(**inputs).token_nelbo
        num_predicted = (inputs["labels"] != -100).sum(-1)
        return None, torch.stack([nelbo.sum(-1), num_predicted.to(nelbo.dtype)], dim=-1), None

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the metrics that the description of this class names."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        nats, num_predicted = np.asarray(output.predictions, dtype=np.float64).sum(axis=0)
        nelbo = nats / num_predicted
        # Infinite for a model that diverged.
        metrics = {"loss": nelbo, "nelbo": nelbo, "perplexity": np.exp(nelbo)}
        output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in metrics.items()})
        return output._replace(predictions=None)

    def _prepare_dataset(self, dataset, processing_class, args, packing: bool, *rest: Any):
        columns = next(iter(dataset), {}).keys()
        packed_by = {"document_ids", "seq_lengths"} & set(columns)
        if packing and packed_by:
            raise ValueError(
                f"`packing` and `eval_packing` must be False for a dataset that is packed already, but got one with "
                f"the column `{packed_by.pop()}`."
            )
        if {"input_ids", "attention_mask"} <= set(columns):
            # TRL takes padding for text.
            dataset = dataset.map(_without_padding, remove_columns="attention_mask")
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "document_ids", "attention_mask"})


@dataclass
class SFTDataCollator(DataCollatorForLanguageModeling):
    """
    Batches by a [`BD3LMDataCollator`], in place of TRL's own, from the columns that `SFTTrainer` makes.

    The texts of a packed row are told apart by `seq_lengths`, which is TRL's, or by `document_ids`.

    Args:
        ignore_bos: The model's `config.ignore_bos`.
    """

    ignore_bos: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and, where there is something to tell, `attention_mask` and `document_ids`."""
        collate = BD3LMDataCollator(self.pad_token_id, self.ignore_bos, self.pad_to_multiple_of)
        return collate([self._with_documents(example) for example in examples])

    @staticmethod
    def _with_documents(example: dict[str, Any]) -> dict[str, Any]:
        if example.get("seq_lengths") is not None:
            lengths = example["seq_lengths"]
            return {**example, "document_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths)}
        if example.get("document_ids") is not None:
            # TRL cuts off `input_ids` and `labels` alone.
            return {**example, "document_ids": example["document_ids"][: len(example["input_ids"])]}
        return example


def _check_arguments(args: TrainingArguments | None, given: dict[str, Any], processing_class) -> None:
    for name, reason in REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"`{name}` must be None, but got {given[name]!r}: {reason}.")
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            "`processing_class` must be a tokenizer, since the models read text alone, but got a "
            f"{type(processing_class).__name__}."
        )
    for name, (allowed, reason) in ALLOWED_ARGUMENTS.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, but got {value!r}: {reason}.")
    template = getattr(args, "chat_template_path", None)
    if template is not None and not template.endswith((".jinja", ".j2")):
        raise ValueError(
            f"`chat_template_path` must be a Jinja file (.jinja or .j2), but got {template!r}: with the template of a "
            "tokenizer come tokens of its own, which could take the id of the mask token."
        )
    if getattr(args, "greater_is_better", None) and getattr(args, "metric_for_best_model", None):
        raise ValueError(
            f"`greater_is_better` must be False, but got True for {args.metric_for_best_model!r}: of all metrics here "
            "less is better."
        )


def _check_model(model: nn.Module, peft_config) -> None:
    config = getattr(model, "config", None)
    if not (hasattr(config, "block_size") and hasattr(config, "mask_token_id")):
        raise ValueError(
            "`model` must be a block diffusion model or a PeftModel around one, but got a "
            f"{type(model).__name__}, whose configuration has no `block_size` and `mask_token_id`."
        )
    config = getattr(model, "active_peft_config", None) if peft_config is None else peft_config
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            "`peft_config` must adapt weights, as LoRA does, but got a "
            f"{type(config).__name__}: the tokens that it puts before a text would move its blocks."
        )


def _load(
    name: str, args: TrainingArguments | None, processing_class, quantization_config
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder or a repository on the Hub, and where none was given its tokenizer."""
    trust_remote_code = getattr(args, "trust_remote_code", False)
    options = getattr(args, "model_init_kwargs", None) or {}
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "`quantization_config` must be given once, but got one as an argument and one in `model_init_kwargs`."
            )
        options = {**options, "quantization_config": quantization_config}
    # As SFTTrainer does: other types of weights are asked for.
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, **options}
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            name, revision=options.get("revision"), trust_remote_code=options["trust_remote_code"]
        )
    return load_whole(AutoModelForMaskedLM, name, **options), processing_class


@contextlib.contextmanager
def _no_model_init_kwargs(args: TrainingArguments | None) -> Iterator[None]:
    """Within it SFTTrainer is not told of `model_init_kwargs`, which have had their effect."""
    if getattr(args, "model_init_kwargs", None) is None:
        yield
        return
    given, args.model_init_kwargs = args.model_init_kwargs, None
    try:
        yield
    finally:
        args.model_init_kwargs = given


@contextlib.contextmanager
def _forward_kept(model: nn.Module) -> Iterator[None]:
    """After it the model has the forward that it had, which SFTTrainer replaces by one for next-token losses."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward


def _without_padding(example: dict[str, Any]) -> dict[str, Any]:
    is_real = example["attention_mask"]
    return {
        name: [value for value, real in zip(example[name], is_real, strict=True) if real]
        for name in TOKEN_COLUMNS
        if name in example
    }
