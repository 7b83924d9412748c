"""
Trains tiny models and writes down what happens at each step: what the tests of resumed and of distributed runs launch.

    python training_script.py JOBS.json

JOBS.json holds a list of keyword arguments of `train`. Each job is a process of its own, forked here because to start
Python and to import everything takes seconds; launched as one of several processes, this one does all the jobs.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, patch_environment
from adapted import adapted_lm
from conftest import random_model
from transformers import TrainerCallback, TrainerState, modeling_utils

import bd3lm_hf.training.ema
from bd3lm_hf import BD3LMForMaskedLM, BD3LMTrainer, BD3LMTrainingArguments


# Where each file of a checkpoint is written: the owner of a function that takes the path, and its name.
WRITERS = {
    "model.safetensors": (modeling_utils, "safe_save_file"),
    "ema.safetensors": (bd3lm_hf.training.ema, "save_file"),
    "optimizer.pt": (torch, "save"),
    "rng_state.pth": (torch, "save"),
    "trainer_state.json": (TrainerState, "save_to_json"),
}


def random_lengths(number: int) -> list[int]:
    return np.random.default_rng(number).integers(8, 33, size=number).tolist()


def examples(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Random texts of these lengths."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(22, size=length).tolist()} for length in lengths]


class Recorder(TrainerCallback):
    """Writes one line per log entry of each process: the step, the figures, the interval, a hash of the average."""

    def __init__(self, file: Path):
        self.file = file
        self.trainer: BD3LMTrainer | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {
            name: float(value)
            for name, value in logs.items()
            if not name.startswith(("train_", "epoch")) and not name.endswith(("_runtime", "_per_second", "_flos"))
        }
        entry = {"step": state.global_step, "interval": self.trainer.config.noise_interval, "ema": None, **figures}
        ema = self.trainer.ema_callback
        if ema is not None and ema.weights is not None:
            hash = hashlib.sha256()
            for average in ema.weights.averaged.parameters():
                whole = average.full_tensor() if hasattr(average, "full_tensor") else average
                hash.update(whole.detach().numpy().tobytes())
            entry["ema"] = hash.hexdigest()
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(output_dir: str | Path, process: int = 0) -> list[dict[str, Any]]:
    """What `train` wrote down, in the order of the steps."""
    return [json.loads(line) for line in Path(output_dir, f"log_{process}.jsonl").read_text().splitlines()]


class KillAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(file: str, checkpoint: str, part: float = 0.5) -> None:
    """Has this process die when a part of a file of a checkpoint is written."""
    owner, name = WRITERS[file]
    write = getattr(owner, name)

    def write_part(*args, **kwargs):
        result = write(*args, **kwargs)
        for path in (Path(value) for value in args if isinstance(value, (str, Path))):
            if path.name == file and path.parent.name == checkpoint:
                os.truncate(path, int(part * path.stat().st_size))
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, write_part)


def kill_while_deleting() -> None:
    """Has this process die when all but one file of an old checkpoint are deleted, the one which says it is whole."""

    def delete_most(folder, *args, **kwargs):
        for path in Path(folder).iterdir():
            if path.name != "trainer_state.json":
                path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    shutil.rmtree = delete_most


def record_files_before_state() -> None:
    """Has process 1 save its random state late, and process 0 write down what there is when it saves its state."""
    save, save_to_json = torch.save, TrainerState.save_to_json

    def late_save(state, file, *args, **kwargs):
        if str(file).endswith("rng_state_1.pth"):
            time.sleep(0.3)
        save(state, file, *args, **kwargs)

    def recorded_save_to_json(state, path):
        files = sorted(file.name for file in Path(path).parent.iterdir())
        Path(path).with_name("files_before_state.json").write_text(json.dumps(files))
        save_to_json(state, path)

    torch.save, TrainerState.save_to_json = late_save, recorded_save_to_json


def train(
    output_dir: str | Path,
    resume: bool | str | None = None,
    model: BD3LMForMaskedLM | dict[str, Any] | None = None,
    kill: int | list | None = None,
    lengths: list[int] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **arguments: Any,
) -> BD3LMTrainer:
    """
    Args:
        output_dir: where checkpoints, logs and the final model go.
        resume: as `resume_from_checkpoint`.
        model: by default a tiny one; overrides of its configuration, or arguments of `adapted_lm` as "adapted", or
            another.
        kill: the step after which to die, or the arguments of `kill_while_writing`, or [] to die while deleting.
        lengths: of the random texts to train on, by default 24 of different ones.
        arguments: those of training.
    """
    arguments = {
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "ema_decay": 0.8,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 4,
        "seed": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    arguments = BD3LMTrainingArguments(str(output_dir), **arguments)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on accelerators alone, by this name of what it found; torch itself shards on a CPU as well.
        assert arguments.distributed_state.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    if not isinstance(model, torch.nn.Module):
        adapted = (model or {}).get("adapted")
        model = random_model(attn_implementation="sdpa", **(model or {})) if adapted is None else adapted_lm(**adapted)
    recorder = Recorder(output_dir / f"log_{arguments.process_index}.jsonl")
    trainer = BD3LMTrainer(
        model,
        arguments,
        train_dataset=examples(lengths or random_lengths(24), seed=0),
        eval_dataset=examples(random_lengths(13), seed=1),
        callbacks=[recorder, *callbacks],
    )
    recorder.trainer = trainer
    if isinstance(kill, int):
        trainer.add_callback(KillAtStep(kill))
    elif kill is not None:
        kill_while_writing(*kill) if kill else kill_while_deleting()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output_dir / "final"))
    return trainer


def run_in_processes_of_their_own(jobs: list[dict[str, Any]]) -> None:
    """One process after the other. What one that is killed leaves behind is kept in the folder `OUTPUT_DIR-killed`."""
    # Spares the children from collecting, and so from copying, what was imported.
    gc.freeze()
    for job in jobs:
        process = os.fork()
        if process == 0:
            train(**job)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if "kill" in job:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, job
            shutil.copytree(job["output_dir"], f"{job['output_dir']}-killed", dirs_exist_ok=True)
        else:
            assert status == 0, job


def run_in_this_process(jobs: list[dict[str, Any]]) -> None:
    """`environment`: variables set for a job. `refused`: it ends in an error, which is written to `error.txt`."""
    record_files_before_state()
    for job in jobs:
        with patch_environment(**job.pop("environment", {})):
            if not job.pop("refused", False):
                train(**job)
                continue
            try:
                train(**job)
            except ValueError as error:
                Path(job["output_dir"], "error.txt").write_text(str(error))


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if "WORLD_SIZE" in os.environ:
        run_in_this_process(jobs)
    else:
        run_in_processes_of_their_own(jobs)
