"""What happens around the steps of `BD3LMTrainer`: moving average, chosen noise interval, scheduled block sizes."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..kernels.compiled import can_compile, compile_training, uncompile_training
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


class CompiledStepCallback(TrainerCallback):
    """
    Trains by the static step of `bd3lm_hf.kernels.compiled`; after training the model is as it was.

    A model in shards (FSDP2, DeepSpeed), whose weights are gathered and taken away again by hooks on its modules, runs
    the same step uncompiled.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not can_compile(model):
            logger.warning("The training step is not compiled: `bd3lm_hf.kernels` are not attached to the model.")
            return
        is_sharded = args.deepspeed is not None or any(isinstance(module, FSDPModule) for module in model.modules())
        backend = None if is_sharded else args.torch_compile_backend or "inductor"
        compile_training(model, backend, args.torch_compile_mode)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        uncompile_training(model)


class MaskTokenCallback(TrainerCallback):
    """
    Gives the mask token's embedding, a row among others, the learning rate `args.mask_token_learning_rate`.

    An optimizer has groups of whole parameters alone. What a step changes of the row is multiplied by the ratio of
    both learning rates, which is the same for optimizers that treat each number by itself, as AdamW and SGD do.

    Raises:
        ValueError: the row is not trained, or lies where a step does not reach it (DeepSpeed).
    """

    def __init__(self, mask_token_id: int):
        self.mask_token_id = mask_token_id
        self.rows: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.deepspeed is not None:
            raise ValueError(
                "`mask_token_learning_rate` must be None with DeepSpeed, which keeps the weights that it steps, but "
                f"got {args.mask_token_learning_rate}."
            )
        self.ratio = args.mask_token_learning_rate / args.learning_rate
        found = mask_token_rows(model, self.mask_token_id)
        if not found:
            raise ValueError(
                "`mask_token_learning_rate` must be None where the mask token's embedding is not trained, but got "
                f"{args.mask_token_learning_rate}; with PEFT, `trainable_token_indices=[{self.mask_token_id}]` trains "
                "it."
            )
        # Of a sharded matrix one process holds the row, the others an empty piece.
        self.rows = [row for parameter, index in found for row in local_row(parameter, index)]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = [row.detach().clone() for row in self.rows]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for row, before in zip(self.rows, self.before, strict=True):
            row.copy_(before + self.ratio * (row - before))


def mask_token_rows(model: nn.Module, mask_token_id: int) -> list[tuple[nn.Parameter, int]]:
    """The trained parameters that hold an embedding of the mask token, and in which row."""
    found = []
    embeddings = model.get_input_embeddings()
    for name, parameter in embeddings.named_parameters():
        if not parameter.requires_grad:
            continue
        if "trainable_tokens_delta" in name:
            # PEFT keeps the rows of the tokens that it trains.
            layer = embeddings.get_submodule(name.rpartition("trainable_tokens_delta")[0].rstrip("."))
            indices = layer.token_indices["default"]
            found += [(parameter, indices.index(mask_token_id))] if mask_token_id in indices else []
        elif name.endswith("weight"):
            found.append((parameter, mask_token_id))
    return found


def local_row(parameter: nn.Parameter, index: int) -> list[torch.Tensor]:
    """The row [hidden] of a matrix, in a list; an empty list where another process holds it."""
    if not isinstance(parameter, DTensor):
        return [parameter.data[index]]
    numbers = torch.arange(parameter.shape[0], device=parameter.device)[:, None]
    numbers = distribute_tensor(numbers, parameter.device_mesh, parameter.placements).to_local()[:, 0]
    return [parameter.to_local().data[place] for place in (numbers == index).nonzero().flatten().tolist()]


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
