"""`BD3LMDistillationTrainer`: a block diffusion model learns the distributions of an autoregressive one."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.compiled import unwrapped
from ..noise.sampler import Noise
from .arguments import BD3LMTrainingArguments
from .divergence import DIVERGENCES, token_divergences, token_nats_by
from .rollouts import roll_out
from .teacher import CausalTeacher, Teacher
from .trainer import BD3LMTrainer


TEXT = ("attention_mask", "position_ids", "document_ids")
# Seeds of rollouts: room for so many rows a step, and so many steps a run.
ROWS_OF_A_STEP, STEPS_OF_A_RUN = 2**20, 2**30


@dataclass
class BD3LMDistillationArguments(BD3LMTrainingArguments):
    """
    [`BD3LMTrainingArguments`], and how to learn from the teacher.

    Args:
        divergence: "forward", KL(teacher || student), which covers what the teacher may write; or "reverse",
            KL(student || teacher), which keeps to what it probably writes.
        teacher_top_k: count so many of the teacher's likeliest tokens one by one and the others as one; None for the
            whole vocabulary.
        on_policy_fraction: share of batches, in [0, 1], whose texts the student writes itself, from the beginnings of
            the data's (Agarwal et al., arXiv 2306.13649).
        rollout_prompt_length: tokens of each row that it goes on from.
        rollout_arguments: further arguments of `generate` for that.

    Raises:
        ValueError: an argument outside its range.
    """

    divergence: str = field(
        default="forward", metadata={"help": "KL(teacher || student) or its reverse.", "choices": DIVERGENCES}
    )
    teacher_top_k: int | None = field(
        default=None, metadata={"help": "Count so many of the teacher's tokens one by one. (default: all)"}
    )
    on_policy_fraction: float = field(
        default=0.0, metadata={"help": "Share of batches whose texts the student writes."}
    )
    rollout_prompt_length: int = field(default=16, metadata={"help": "Tokens that the student goes on from."})
    rollout_arguments: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `generate` for that."}
    )

    def __post_init__(self):
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` must be False: the compiled step has the loss of likelihood, but got True."
            )
        self.torch_compile = False
        super().__post_init__()
        rules = {
            "divergence": (self.divergence in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}"),
            "teacher_top_k": (self.teacher_top_k is None or self.teacher_top_k >= 1, "at least 1, or None"),
            "on_policy_fraction": (0 <= self.on_policy_fraction <= 1, "in [0, 1]"),
            "rollout_prompt_length": (self.rollout_prompt_length >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, but got {getattr(self, name)!r}.")


class BD3LMDistillationTrainer(BD3LMTrainer):
    """
    Trains a block diffusion model to predict what a frozen autoregressive model predicts, in place of the text's own
    tokens: the loss is that of [`BD3LMTrainer`] with the divergence of both distributions where that has the nats of
    the masked token. The teacher reads the clean text, each token's predecessors, in one causal forward; the student
    reads its block partly masked. With `autoregressive_loss_weight` its clean stream learns from the teacher, too.

    Noise, weights, block sizes by schedule, resuming and evaluation by likelihood are those of [`BD3LMTrainer`].
    Logits of both models are there for a few tokens at a time only.

    Args:
        model: As [`BD3LMTrainer`] takes it.
        args: [`BD3LMDistillationArguments`].
        teacher: A causal language model of Transformers with the same tokenizer, or its name or folder; its modules
            are taken over. By default the autoregressive model that `model` is as it is handed over: a copy, or the
            model under its adapters. A run that is resumed must be handed the model that it began with.
        data_collator, train_dataset, eval_dataset, kwargs: As [`BD3LMTrainer`] takes them.

    Raises:
        ValueError: what [`BD3LMTrainer`] refuses; no teacher for a model that holds none; rollouts under FSDP, or from
            packed rows.
    """

    loss_in_card = "the divergence from what an autoregressive teacher predicts"

    def __init__(
        self,
        model=None,
        args: BD3LMDistillationArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *,
        teacher=None,
        **kwargs: Any,
    ):
        args = BD3LMDistillationArguments("tmp_trainer") if args is None else args
        if not isinstance(args, BD3LMDistillationArguments):
            raise ValueError(f"`args` must be BD3LMDistillationArguments, but got {type(args).__name__}.")
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        if self.is_fsdp_enabled and args.on_policy_fraction:
            raise ValueError(
                "`on_policy_fraction` must be 0 under FSDP, whose processes write texts of different numbers of "
                f"forwards, but got {args.on_policy_fraction}."
            )
        if teacher is not None:
            # Before its modules are taken over.
            self.teacher_name = teacher if isinstance(teacher, str) else teacher.config._name_or_path
        self.teacher = self._teacher_of(teacher, self.accelerator.unwrap_model(self.model))
        self.teacher.to(self.args.device)

    def _teacher_of(self, teacher: Any, student: nn.Module) -> Teacher:
        if not self.config.ignore_bos:
            raise ValueError("`ignore_bos` of the model must be True, as a teacher predicts no first token.")
        return CausalTeacher.of(teacher, student, self.processing_class)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As [`BD3LMTrainer`] gets them, some of them with texts that the student has written."""
        if not self.args.on_policy_fraction:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = (self._rolled_out(batch, index) for index, batch in enumerate(epoch_iterator))
        return super().get_batch_samples(batches, num_batches, device)

    def _rolled_out(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """The batch of that number within its step, or what the student writes from the beginnings of its rows."""
        args, step = self.args, self.state.global_step
        # The same on all processes.
        if random.Random(f"{args.seed} {step} {index}").random() >= args.on_policy_fraction:
            return batch
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if batch.get("document_ids") is not None or batch.get("position_ids") is not None:
            raise ValueError("`train_dataset` must not be packed with `on_policy_fraction`, but got `document_ids`.")
        # Padding before a text would be taken for its beginning.
        shortest = ids.shape[1] if mask is None else int(mask.long().cumprod(-1).sum(-1).min())
        if args.rollout_prompt_length >= shortest:
            raise ValueError(
                f"`rollout_prompt_length` must be less than the length of all rows, padded on the right, but got "
                f"{args.rollout_prompt_length} for a row that begins with {shortest} tokens."
            )
        first = (index * args.world_size + args.process_index) * self._train_batch_size
        start = (args.seed * STEPS_OF_A_RUN + step) * ROWS_OF_A_STEP + first
        seeds = list(range(start, start + len(ids)))
        student = self.accelerator.unwrap_model(self.model)
        # Weights are rounded once for all forwards, where training rounds them.
        with self.compute_loss_context_manager():
            return roll_out(student, ids, args.rollout_prompt_length, seeds, **(args.rollout_arguments or {}))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any):
        """As [`BD3LMTrainer.compute_loss`], with divergences in nats per predicted token."""
        student, lessons = unwrapped(self.model), self._lessons(inputs)

        def divergences(hidden_states: Tensor, targets: Tensor) -> Tensor:
            options = {"kind": self.args.divergence, "top_k": self.args.teacher_top_k}
            pair = ((hidden_states, student._logits), (next(lessons), self.teacher.logits))
            return token_divergences(*pair, self.config.mask_token_id, **options)

        with token_nats_by(student, divergences):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _draw_noise(self, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Noise:
        noise = super()._draw_noise(inputs, *args, **kwargs)
        self._x_t = noise.x_t
        return noise

    def _lessons(self, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
        """
        The teacher's final hidden states [num_tokens, hidden] for what the student predicts: the masked tokens, in
        whose block the student reads, and then the clean stream's next tokens. They are asked for after the noise.
        """
        blocks = self._text_blocks(inputs)
        length = inputs["input_ids"].shape[1]
        text = {name: inputs[name] for name in TEXT if inputs.get(name) is not None}
        states = self.teacher.states(inputs["input_ids"], **text)
        masked = (self._x_t == self.config.mask_token_id).unflatten(1, (-1, length)) & blocks.predicted[:, None]
        rows, columns = masked.flatten(1).nonzero(as_tuple=True)
        # A token is predicted at the one before it.
        yield states[rows, columns % length - 1]
        follows = blocks.predicted[:, 1:] & (blocks.position_ids.diff(dim=-1) == 1)
        yield states[follows.nonzero(as_tuple=True)]
