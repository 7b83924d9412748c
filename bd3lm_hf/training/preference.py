"""TRL's trainers for preferences and rewards, with the log-probabilities of block diffusion."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..evaluation.networks import is_block_diffusion
from ..hub.training_summary import named_in_card
from .bound import token_log_probs
from .publishing import PublishingMixin
from .resuming import ResumingMixin


try:
    from trl import DPOTrainer, GRPOTrainer
    from trl.trainer import dpo_trainer, grpo_trainer

    if not (hasattr(dpo_trainer, "add_fused_lm_head") and hasattr(grpo_trainer, "add_fused_lm_head")):
        raise ImportError("TRL before 1.16 computes log-probabilities elsewhere.")
except ImportError as error:
    raise ImportError("`bd3lm_hf.training.preference` needs TRL 1.16: pip install 'bd3lm-hf[trl]'") from error


# What TRL reads off logits of the next token. There are none here, and the numbers would mean nothing.
NOT_LOGGED = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
# The noise of training and that of evaluation are drawn from seeds of their own.
TRAINING_NOISE, EVALUATION_NOISE = 0, 1
# What a checkpoint holds of completions that are to be learned from still.
COMPLETIONS = ("step", "written_at", "inputs")
# The values that an argument may have, and why it may have no other.
ALLOWED_OF_BOTH = {
    "use_liger_kernel": ((False,), "Liger's kernels are made for next-token losses"),
    "router_aux_loss_coef": ((None, 0), "the bound has no part for a router of experts"),
}
ALLOWED_OF_DPO = {
    "precompute_ref_log_probs": ((False,), "the reference meets the noise of the step"),
    "padding_free": ((False,), "its flat batches need attention of variable lengths"),
    "use_weighting": ((False,), "its weights are read off next-token logits"),
    "truncation_mode": (("keep_start",), "a text is conditioned on how it starts"),
}
ALLOWED_OF_GRPO = {
    "temperature": ((1.0,), "the bound is that of the model itself"),
    "top_entropy_quantile": ((1.0,), "there are no entropies of next tokens"),
    "entropy_coef": ((None, 0, 0.0), "there are no entropies of next tokens"),
    "use_vllm": ((False,), "it writes one token after the other"),
    "use_transformers_continuous_batching": ((False,), "it writes one token after the other"),
    "cast_lm_head_to_fp32": ((False,), "the loss is computed in float32 already"),
}


@dataclass
class TokenScores(ModelOutput):
    """What TRL reads of a model: values of the tokens after the first, each [batch, length - 1]."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


class _BoundMixin(ResumingMixin, PublishingMixin):
    """
    Gives TRL's trainers, in the place of next-token log-probabilities, each token's part of the bound, and the model
    cards of this package.
    """

    # There is no average of the weights, and no likelihood in the log.
    ema_callback, history_before = None, ()
    _tag_names: list[str] = []
    _trl_module: ModuleType
    _allowed: dict[str, tuple[tuple, str]]

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        *,
        num_samples: int = 4,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        self._check(model, kwargs.get("args"), num_samples, {**kwargs, "peft_config": peft_config})
        self.num_samples = num_samples
        if peft_config is not None and peft_config.task_type is None:
            peft_config = copy.copy(peft_config)
            peft_config.task_type = "CAUSAL_LM"
        # Under adapters the model itself is its reference.
        needs_copy = not hasattr(model, "get_base_model") and peft_config is None and self._has_reference(kwargs)
        with self._in_place_of_trl(copy.deepcopy(model) if needs_copy else None):
            super().__init__(model, peft_config=peft_config, **kwargs)

    @classmethod
    def _has_reference(cls, given: dict[str, Any]) -> bool:
        """Whether arguments of the trainer ask for a reference that is what the model was at the start."""
        raise NotImplementedError

    @classmethod
    def _check(cls, model: nn.Module, args: Any, num_samples: int, given: dict[str, Any]) -> None:
        if not is_block_diffusion(getattr(model, "config", None)):
            raise ValueError(
                f"`model` must be a block diffusion model or a PeftModel around one, but got {type(model).__name__}."
            )
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, but got {num_samples}.")
        if given.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` must be None: there are no logits to compute metrics of.")
        adapter = given["peft_config"] or getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"`peft_config` must adapt weights, as LoRA does, but got a {type(adapter).__name__}: the tokens that "
                "it puts before a text would move its blocks."
            )
        for name, (allowed, reason) in {**ALLOWED_OF_BOTH, **cls._allowed}.items():
            value = getattr(args, name, allowed[0])
            if value not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, but got {value!r}: {reason}.")

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` must be False in a run that is resumed, as no checkpoint holds the reference, but "
                "got True."
            )

    @contextlib.contextmanager
    def _in_place_of_trl(self, reference: nn.Module | None) -> Iterator[None]:
        """Within it TRL gives models the scores of this file, and takes `reference` for the model at the start."""
        module = self._trl_module
        with (
            mock.patch.object(module, "add_fused_lm_head", self._add_scores),
            mock.patch.object(module, "create_model_from_path", lambda *args, **kwargs: reference),
        ):
            yield

    def _add_scores(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As TRL's `add_fused_lm_head`: what `model(..., fused_lm_head=True)` returns from now on."""
        add_scores(model, lambda *batch: token_log_probs(*batch, self.num_samples, self._noise_seed()))

    def _noise_seed(self) -> tuple[int, ...]:
        """The same for policy and reference."""
        raise NotImplementedError

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, whatever is wrapped around the model."""
        return self.accelerator.unwrap_model(self.model).config

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with what the card tells of the run beside the weights."""
        super().save_model(output_dir, _internal_call)
        self.save_summary(output_dir or self.args.output_dir)

    def recipe_in_card(self) -> dict[str, Any]:
        """What [`TrainingSummary`] calls the recipe."""
        copies = "one noised copy" if self.num_samples == 1 else f"{self.num_samples} noised copies"
        loss = f"{self.loss_in_card}; log-probabilities are estimates of the bound from {copies} of each text"
        return {"loss": loss, "reference": named_in_card(self.teacher_name)}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL's, without what is read off next-token logits."""
        for mode in self._metrics.values():
            for name in NOT_LOGGED:
                mode.pop(name, None)
        super().log(logs, *args, **kwargs)


def add_scores(model: nn.Module, log_probs_of: Callable[..., Tensor]) -> None:
    """
    From now on `model(input_ids, attention_mask, labels, fused_lm_head=True)` returns [`TokenScores`] of what
    `log_probs_of` (model, input_ids, labels, attention_mask) gives [batch, length]; without the flag what it did.
    """
    plain = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any):
        if not fused_lm_head:
            return plain(*args, **kwargs)
        values = log_probs_of(model, kwargs["input_ids"], kwargs["labels"], kwargs.get("attention_mask"))[:, 1:]
        nothing = torch.zeros_like(values)
        return TokenScores(log_probs=values, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    model.forward = forward


class BD3LMDPOTrainer(_BoundMixin, DPOTrainer):
    """
    TRL's `DPOTrainer` for block diffusion language models.

    The log-probability of a completion is an estimate of the bound ([`token_log_probs`]) under noise that policy and
    reference share and that changes with each step (VRPO; LLaDA 1.5, arXiv 2505.19223). Datasets, losses, PEFT and
    arguments are TRL's. Without `ref_model` the reference is a copy of the model, or the model under its adapters.

    Args:
        model: A block diffusion model, or a `PeftModel` around one.
        ref_model, args, train_dataset, eval_dataset, processing_class, kwargs: As `DPOTrainer` takes them, by name.
        num_samples: Noised copies of each text; more make the estimate vary less.
        peft_config: The adapter to train.

    Raises:
        ValueError: a model of another kind, or an argument that has no meaning for the bound.
    """

    loss_in_card = (
        "that of direct preference optimisation, under noise that policy and reference share "
        "([VRPO](https://arxiv.org/abs/2505.19223))"
    )
    _tag_names = ["trl", "dpo", "block-diffusion"]
    _trl_module, _allowed = dpo_trainer, ALLOWED_OF_DPO

    def __init__(self, model: PreTrainedModel | nn.Module, ref_model: nn.Module | None = None, **kwargs: Any):
        if ref_model is not None:
            self.teacher_name = ref_model.config._name_or_path
        super().__init__(model, ref_model=ref_model, **kwargs)

    @classmethod
    def _has_reference(cls, given: dict[str, Any]) -> bool:
        return given.get("ref_model") is None

    def _noise_seed(self) -> tuple[int, ...]:
        if self.model.training:
            return (self.args.seed, TRAINING_NOISE, self.state.global_step)
        return (self.args.seed, EVALUATION_NOISE)


class BD3LMGRPOTrainer(_BoundMixin, GRPOTrainer):
    """
    TRL's `GRPOTrainer` for block diffusion language models.

    Completions are written by the model's own `generate`; `args.generation_kwargs` choose the sampler. The
    log-probability of each token is its part of an estimate of the bound ([`token_log_probs`]), under noise that
    depends on the text and on the step in which it was written, so that old policy, new policy and reference meet the
    same (diffu-GRPO, arXiv 2504.12216, has one pass over the masked completion in its place). Rewards, datasets, PEFT
    and arguments are TRL's.

    Args:
        model: A block diffusion model, or a `PeftModel` around one.
        reward_funcs, args, train_dataset, processing_class, kwargs: As `GRPOTrainer` takes them, by name.
        num_samples: Noised copies of each text; more make the estimate vary less.
        peft_config: The adapter to train.

    Raises:
        ValueError: a model of another kind, or an argument that has no meaning for the bound.
    """

    loss_in_card = (
        "that of group relative policy optimisation, under noise that policy, old policy and reference share "
        "([diffu-GRPO](https://arxiv.org/abs/2504.12216) has another estimate)"
    )
    _tag_names = ["trl", "grpo", "block-diffusion"]
    _trl_module, _allowed = grpo_trainer, ALLOWED_OF_GRPO

    # The step in which the completions at hand were written.
    _written_at = 0

    @classmethod
    def _has_reference(cls, given: dict[str, Any]) -> bool:
        return bool(getattr(given.get("args"), "beta", 0))

    def recipe_in_card(self) -> dict[str, Any]:
        """As of the others, with the names of the rewards; without a `beta` there is no reference."""
        facts = super().recipe_in_card()
        if not self.beta:
            del facts["reference"]
        # A folder is not named.
        models = (getattr(function, "config", None) for function in self.reward_funcs)
        names = zip(self.reward_func_names, models, strict=True)
        return facts | {"rewards": [_reward_in_card(name, config) for name, config in names]}

    @classmethod
    def _check(cls, model: nn.Module, args: Any, num_samples: int, given: dict[str, Any]) -> None:
        super()._check(model, args, num_samples, given)
        arguments = getattr(args, "generation_kwargs", None) or {}
        if arguments.get("new_block", getattr(model.generation_config, "new_block", False)):
            raise ValueError(
                "`new_block` of `generation_kwargs` must be False, as the bound counts blocks from the beginning of "
                "the prompt, but got True."
            )

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        self._step, self._buffered_inputs = 0, None
        saved = None if checkpoint is None else Path(checkpoint, self._completions_file)
        if saved is not None and saved.is_file():
            state = torch.load(saved, map_location=self.args.device, weights_only=True)
            self._step, self._written_at, self._buffered_inputs = (state[name] for name in COMPLETIONS)

    def _save_rng_state(self, output_dir: str) -> None:
        # Several steps learn from the same completions.
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            state = (self._step, self._written_at, self._buffered_inputs)
            torch.save(dict(zip(COMPLETIONS, state, strict=True)), Path(output_dir, self._completions_file))
        super()._save_rng_state(output_dir)

    @property
    def _completions_file(self) -> str:
        return f"completions_{self.args.process_index}.pt"

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any):
        if self.model.training:
            self._written_at = self.state.global_step
        return super()._generate_and_score_completions(*args, **kwargs)

    def _noise_seed(self) -> tuple[int, ...]:
        # Masks that a text always met would be learned by heart.
        if self.model.training:
            return (self.args.seed, TRAINING_NOISE, self._written_at)
        return (self.args.seed, EVALUATION_NOISE)


def _reward_in_card(name: str, config: PreTrainedConfig | None) -> str:
    """A function by its name, and a model by its id on the Hub, if it has one."""
    if config is None:
        return f"`{name}`"
    return named_in_card(config._name_or_path) or "a model that is not named"
