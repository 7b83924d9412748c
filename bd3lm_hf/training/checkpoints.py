"""Which checkpoints of training are whole, and whether they belong to a model."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from ..evaluation.networks import fact_of_network, stock_config


logger = logging.get_logger(__name__)

# What the shapes and the meaning of the weights depend on.
ARCHITECTURE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "cond_dim",
    "adaln",
    "time_conditioning",
    "tie_word_embeddings",
    "mask_token_id",
    "shift_logits",
)


def mark_incomplete(folder: str | Path) -> None:
    """Called before a checkpoint is written: takes away what an earlier one of this name ended with."""
    Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)


def what_is_missing(folder: str | Path) -> str | None:
    """
    Why a checkpoint is not whole, or None if it is.

    Trainer writes its state last, so where that is whole, all that came before is; what a full disk or a copy may have
    cut short is told by its own format.
    """
    folder = Path(folder)
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is cut short ({error})"
    # What torch.save writes is a zip archive, whose table stands at the end.
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    # Trainer would go on with a new optimizer. That of a sharded model is `optimizer.bin`, or in a folder.
    has_optimizer = any(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*")) and (folder / SCHEDULER_NAME).is_file()
    if not has_optimizer and not any(path.is_dir() for path in folder.iterdir()):
        return "it has no state of the optimizer; was it saved with `save_only_model`?"
    return None


def check_complete(folder: str | Path) -> None:
    """
    Raises:
        ValueError: `folder` is no whole checkpoint.
    """
    missing = "there is no such folder" if not os.path.isdir(folder) else what_is_missing(folder)
    if missing:
        raise ValueError(f"`resume_from_checkpoint` ({folder}) is no whole checkpoint: {missing}.")


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    The checkpoint of the highest step that is whole.

    Raises:
        ValueError: there is none.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(folder.name.rpartition("-")[2]): folder for folder in folders if folder.name[11:].isdigit()}
    for _, folder in sorted(steps.items(), reverse=True):
        missing = what_is_missing(folder)
        if missing is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {missing}.")
    raise ValueError(f"`resume_from_checkpoint` is True, but there is no whole checkpoint in {output_dir}.")


def check_architecture(folder: str | Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the checkpoint in `folder` was written by a model of another architecture than `config` describes.
    """
    path = Path(folder, CONFIG_NAME)
    # A checkpoint of an adapter has none: PEFT compares the shapes.
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    network = saved.get("text_config") or {}
    saved = {**network, **saved}
    differences = [
        f"{name} {saved[name]} there, {fact_of_network(config, name)} here"
        for name in ARCHITECTURE_FIELDS
        if name in saved and saved[name] != fact_of_network(config, name)
    ]
    if network.get("model_type") != getattr(stock_config(config), "model_type", None):
        differences.insert(0, f"a network of the type {network.get('model_type')!r} there")
    if saved.get("model_type") != config.model_type:
        differences = [f"model_type {saved.get('model_type')!r} there, {config.model_type!r} here"]
    if differences:
        raise ValueError(
            f"`resume_from_checkpoint` ({folder}) is of another architecture than the model: {'; '.join(differences)}."
        )


@contextlib.contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """
    Within it a model sharded by FSDP2 is of the class again that it had before.

    FSDP2 gives it a class made up at run time, and `save_pretrained` would save that one's name and sources.
    """
    sharded_class = type(model)
    if isinstance(model, FSDPModule):
        # After the class made up and FSDPModule.
        model.__class__ = sharded_class.__mro__[2]
    try:
        yield
    finally:
        model.__class__ = sharded_class
