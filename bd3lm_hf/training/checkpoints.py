"""Which checkpoints of training are whole, whose they are, and whether they belong to a model."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from ..evaluation.loading import holds_numbers
from ..evaluation.networks import fact_of_network, stock_config
from .runs import Run


logger = logging.get_logger(__name__)

# Written last: the run, and the size and SHA-256 of each file.
MANIFEST_FILE = "checkpoint_manifest.json"
# What a run does not read when it goes on, and what people may therefore change.
UNREAD_SUFFIXES = (".md", ".py")

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


@dataclass(frozen=True)
class Manifest:
    """
    What a checkpoint consists of.

    Attributes:
        run: The run that wrote it.
        files: Path within the checkpoint -> its `size` in bytes and its `sha256`.
    """

    run: Run
    files: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, folder: str | Path) -> "Manifest | None":
        """
        None if there is none: the checkpoint was not written to its end, or by an earlier version.

        Raises:
            ValueError: it can't be read.
        """
        path = Path(folder, MANIFEST_FILE)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        try:
            files = {
                name: {"size": int(file["size"]), "sha256": file["sha256"]} for name, file in record["files"].items()
            }
            return cls(Run.from_record(record["run"]), files)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no manifest") from error

    def fault_of(self, folder: Path) -> str | None:
        """How what lies in `folder` differs from what was written, None if it does not."""
        for name, written in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size < written["size"]:
                return f"{name} is cut short"
        sums = _sums([folder / name for name in self.files])
        for (name, written), found in zip(self.files.items(), sums, strict=True):
            if found != written["sha256"]:
                return f"{name} is not as it was written (its SHA-256 is another)"
        return None


def write_manifest(folder: str | Path, run: Run) -> None:
    """Completes a checkpoint, all of whose files are written."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in UNREAD_SUFFIXES)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(paths, _sums(paths), strict=True)
    }
    partial = folder / f"{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(asdict(Manifest(run, files)), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST_FILE)


def _sums(paths: list[Path]) -> list[str]:
    # Hashing lets other threads run.
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha256.update(piece)
    return sha256.hexdigest()


def clear_checkpoint(folder: str | Path) -> None:
    """Called before a checkpoint is written: takes away an earlier one of this name, of which nothing may be left."""
    folder = Path(folder)
    # From then on it is not whole.
    for name in (MANIFEST_FILE, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def delete_surplus(newest: str | Path, run: Run, limit: int | None, best: str | None) -> None:
    """
    Deletes checkpoints until `limit` are left, those of other runs first, and neither the newest nor the best.

    Args:
        newest: The checkpoint of `run` that was written just now.
        limit: Number of checkpoints beside it and including it; None or 0 for no limit.
    """
    if not limit or limit < 0:
        return
    newest = Path(newest).resolve()
    kept = {newest} | ({Path(best).resolve()} if best else set())
    folders = numbered_checkpoints(newest.parent)
    newest_step = next(step for step, folder in folders.items() if folder.resolve() == newest)

    def is_own(step: int) -> bool:
        writer = run_of(folders[step])
        return writer is not None and run.owns(writer, step) and step <= newest_step

    surplus = max(0, len(folders) - max(limit, len(kept)))
    candidates = [step for step, folder in folders.items() if folder.resolve() not in kept]
    for step in sorted(candidates, key=lambda step: (is_own(step), step))[:surplus]:
        # Half deleted it is not whole.
        (folders[step] / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folders[step], ignore_errors=True)


def numbered_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Step -> folder."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    named = {folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): folder for folder in folders if folder.is_dir()}
    return {int(number): folder for number, folder in named.items() if number.isdecimal()}


def run_of(folder: str | Path) -> Run | None:
    """The run that wrote a checkpoint; an unnamed one if it has no manifest, None if that can't be read."""
    try:
        manifest = Manifest.of(folder)
    except ValueError:
        return None
    return Run() if manifest is None else manifest.run


def step_of(folder: str | Path) -> int:
    """The step after which a checkpoint was written."""
    return json.loads(Path(folder, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def what_is_missing(folder: str | Path) -> str | None:
    """
    Why a checkpoint is not whole, or None if it is.

    The manifest, which comes last, tells what was written. What has none, from an earlier version or from people who
    changed a checkpoint, must have all that a run goes on from, and each file be whole by its own format.
    """
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    try:
        manifest = Manifest.of(folder)
    except ValueError:
        return f"{MANIFEST_FILE} can't be read"
    fault = None if manifest is None else manifest.fault_of(folder)
    try:
        return (
            fault or _fault_of_state(folder) or _fault_of_formats(folder) or _what_a_run_would_miss(folder, manifest)
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        # A file that is whole as such, and holds something else.
        return f"one of its files holds something else than its name says ({type(error).__name__}: {error})"


def _fault_of_state(folder: Path) -> str | None:
    try:
        step = step_of(folder)
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    except (KeyError, TypeError):
        step = None
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")) if step is not None else {}
    kinds = {"log_history": list, "max_steps": int, "epoch": (int, float, type(None)), "stateful_callbacks": dict}
    for name, kind in kinds.items():
        if name in state and not isinstance(state[name], kind):
            return f"{TRAINER_STATE_NAME} has a `{name}` of another type"
    return None if isinstance(step, int) else f"{TRAINER_STATE_NAME} names no `global_step`"


def _fault_of_formats(folder: Path) -> str | None:
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
    return None


def _what_a_run_would_miss(folder: Path, manifest: Manifest | None) -> str | None:
    """Trainer would go on with a new optimizer, and with other random numbers."""
    has_folders = any(path.is_dir() for path in folder.iterdir())
    # That of a sharded model is `optimizer.bin`, or in a folder.
    has_optimizer = any(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*")) and (folder / SCHEDULER_NAME).is_file()
    if not has_optimizer and not has_folders:
        return "it has no state of the optimizer; was it saved with `save_only_model`?"
    if not any(folder.glob("rng_state*.pth")):
        return "it has no rng_state.pth, the state of the random numbers"
    if not has_folders and not any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*model*")):
        return "it has no weights"
    if manifest is None:
        return _fault_of_numbers(folder) or _what_the_optimizer_misses(folder)
    return None


def _fault_of_numbers(folder: Path) -> str | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            spoilt = [name for name in file.keys() if not holds_numbers(file.get_tensor(name))]  # noqa: SIM118
        if spoilt:
            return f"{path.name} has NaN or infinity in {', '.join(spoilt[:5])}"
    return None


def _what_the_optimizer_misses(folder: Path) -> str | None:
    path, scheduler = folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME
    if scheduler.is_file() and not isinstance(torch.load(scheduler, map_location="cpu", weights_only=True), dict):
        return f"{scheduler.name} holds no state of a schedule"
    if not path.is_file():
        return None
    optimizer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    states = optimizer["state"]
    parameters = {parameter for group in optimizer["param_groups"] for parameter in group["params"]}
    num_tensors = max((len(state) for state in states.values()), default=0)
    lacking = [name for name in sorted(parameters) if len(states.get(name, ())) < num_tensors]
    return f"{path.name} has no state, or not all, of the parameters {lacking}" if lacking else None


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
    The checkpoint of the highest step that is whole, of those that the run which was started last in `output_dir` goes
    on from.

    Raises:
        ValueError: there is none.
    """
    run, foreign = Run.of(output_dir), []
    for step, folder in sorted(numbered_checkpoints(output_dir).items(), reverse=True):
        writer = run_of(folder)
        if writer is not None and writer.id is not None and not run.owns(writer, step):
            foreign.append(folder.name)
            continue
        missing = what_is_missing(folder)
        if missing is None and not run.owns(writer, step):
            missing = f"it has no {MANIFEST_FILE}, which is written last"
        if missing is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {missing}.")
    message = f"`resume_from_checkpoint` is True, but there is no whole checkpoint in {output_dir}"
    if foreign:
        message += (
            f" of the run that was started there last ({', '.join(sorted(foreign))}: of other runs); start it again "
            "without, or name the checkpoint that it shall go on from"
        )
    raise ValueError(f"{message}.")


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """
    The whole checkpoint that is meant, None for none.

    Raises:
        ValueError: it is not whole, or there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_complete_checkpoint(output_dir)
    else:
        check_complete(resume_from_checkpoint)
    if not Path(resume_from_checkpoint, MANIFEST_FILE).is_file():
        logger.warning(f"{resume_from_checkpoint} has no {MANIFEST_FILE}: whether a file has changed is not known.")
    return str(resume_from_checkpoint)


def check_architecture(folder: str | Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the checkpoint in `folder` was written by a model of another architecture than `config` describes.
    """
    path = Path(folder, CONFIG_NAME)
    # A checkpoint of an adapter has none: the tensors are compared.
    if not path.is_file():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`resume_from_checkpoint` ({folder}) has a {CONFIG_NAME} that can't be read.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"`resume_from_checkpoint` ({folder}) has a {CONFIG_NAME} that is no table of settings.")
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


def check_tensors(folder: str | Path, model: nn.Module) -> None:
    """
    Trainer goes on with what a model was before where its checkpoint lacks a tensor.

    Args:
        model: Not sharded, without wrappers.

    Raises:
        ValueError: the checkpoint in `folder` lacks a tensor of the model, or has one of another shape.
    """
    is_adapter = hasattr(model, "peft_config")
    files = sorted(Path(folder).glob("adapter_model.safetensors" if is_adapter else "model*.safetensors"))
    # What lies there in another format torch reads, or FSDP.
    if not files:
        return
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if is_adapter:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        tensors = model.state_dict(keep_vars=True)
    # Tied weights are saved under one of their names.
    saved = {id(tensor) for name, tensor in tensors.items() if name in shapes}
    faults = [f"{name} is missing" for name, tensor in tensors.items() if id(tensor) not in saved]
    faults += [
        f"{name} has the shape {shapes[name]} there, {tuple(tensor.shape)} here"
        for name, tensor in tensors.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    faults += [f"{name} is none of the model's" for name in shapes if name not in tensors and not is_adapter]
    if faults:
        raise ValueError(f"`resume_from_checkpoint` ({folder}) has other tensors than the model: {'; '.join(faults)}.")


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
