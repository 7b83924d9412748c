"""What happens around the steps of `BD3LMTrainer`: moving average, chosen noise interval, scheduled block sizes."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
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
