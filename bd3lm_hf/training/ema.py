"""The exponential moving average of the weights: kept while training, evaluated with, saved, restored, exported."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..hub.training_summary import EMA_FILE


class AveragedWeights:
    """
    The moving average of a model's trainable parameters, by `torch.optim.swa_utils.AveragedModel`.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in the published training code, so that a short run
    is averaged over its last tenth and not over its start.

    Args:
        model: Its parameters are those that the optimizer updates: where they are sharded (FSDP2), so is the average.
        decay: In (0, 1).

    Raises:
        ValueError: a trainable parameter is not float32, in which updates as small as 1 - decay would be lost, or is
            sharded in a way that hides which weight it is part of (FSDP1, DeepSpeed ZeRO-3).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self._reshard()
        # FSDP's own activation checkpointing puts a module of its own around each layer.
        named = {
            name.replace("_checkpoint_wrapped_module.", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        if is_fsdp1 or any(hasattr(parameter, "ds_id") for parameter in named.values()):
            raise ValueError(
                "`ema_decay` averages whole weights or those that FSDP2 shards, but "
                f"{'FSDP1' if is_fsdp1 else 'ZeRO-3'} shards them; take FSDP2 (`fsdp_version: 2`), or set `ema_decay` "
                "to 0."
            )
        for name, parameter in named.items():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"`ema_decay` averages float32 weights (train in bf16 by `bf16=True`, which keeps them), but "
                    f"{name} is {parameter.dtype}; load the model with dtype=float32, or set `ema_decay` to 0."
                )
        self.names = list(named)
        self.parameters = nn.ParameterList(named.values())

        def update(averaged, current, num_averaged):
            warm_up = (1 + int(num_averaged)) / (10 + int(num_averaged))
            get_ema_multi_avg_fn(min(decay, warm_up))(averaged, current, num_averaged)

        self.averaged = AveragedModel(self.parameters, multi_avg_fn=update)
        self.is_applied = False

    def update(self) -> None:
        """Takes the model's present weights into the average."""
        self.averaged.update_parameters(self.parameters)

    def _reshard(self) -> None:
        """Has FSDP2 gather all weights anew: those that it keeps gathered after a forward pass would miss a change."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averaged.parameters(), strict=True):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)
        self._reshard()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self._swap()
        self.is_applied = True
        try:
            yield
        finally:
            self._swap()
            self.is_applied = False

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Gives the model the averaged weights for good."""
        for parameter, average in zip(self.parameters, self.averaged.parameters(), strict=True):
            parameter.copy_(average)
        self._reshard()

    def save(self, folder: str | Path, is_main_process: bool = True) -> None:
        """Writes the average into a checkpoint folder; every process of a sharded model must call this."""
        tensors = {}
        for name, average in zip(self.names, self.averaged.parameters(), strict=True):
            whole = average.detach().full_tensor() if isinstance(average, DTensor) else average.detach()
            if is_main_process:
                tensors[name] = whole.contiguous()
        if is_main_process:
            metadata = {"num_averaged": str(int(self.averaged.n_averaged))}
            save_file(tensors, Path(folder, EMA_FILE), metadata=metadata)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: there is no such file, or its weights are not those of this model.
        """
        check_saved_average(folder)
        with safe_open(Path(folder, EMA_FILE), framework="pt") as file:
            if set(file.keys()) != set(self.names):
                difference = sorted(set(file.keys()) ^ set(self.names))
                raise ValueError(
                    f"`resume_from_checkpoint` ({folder}) averages other weights than the model trains: {difference}."
                )
            for name, average in zip(self.names, self.averaged.parameters(), strict=True):
                whole = file.get_tensor(name).to(average.device)
                if isinstance(average, DTensor):
                    whole = distribute_tensor(whole, average.device_mesh, average.placements)
                average.copy_(whole)
            self.averaged.n_averaged.fill_(int(file.metadata()["num_averaged"]))


def check_saved_average(folder: str | Path) -> None:
    """
    Raises:
        ValueError: the checkpoint in `folder` holds no moving average.
    """
    if not Path(folder, EMA_FILE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` ({folder}) holds no moving average ({EMA_FILE}): it was trained without. Set "
            "`ema_decay` to 0."
        )
