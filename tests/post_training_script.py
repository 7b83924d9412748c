"""
Trains tiny models by distillation, on a sampler's path, by DPO and by GRPO, and writes their weights.

    python post_training_script.py processes FOLDER NUM_PROCESSES

trains each on however many processes it is started.

    python post_training_script.py kills FOLDER

trains each, with and without LoRA, in a process of its own that goes on to the end, and in one that is killed in its
third step by SIGKILL and goes on from its last checkpoint in a new process.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from adapted_cases import adapt, random_ids, stock_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_distillation import rows_of, trainer_of
from test_few_steps import few_steps
from test_preference import dpo, grpo, pairs
from transformers import TrainerCallback


NAMES = ("distillation", "few_steps", "dpo", "grpo")
KILLED_AT = 3


def trainer(name, folder, with_lora=False, **arguments):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if name in ("dpo", "grpo"):
        arguments |= {"data": pairs(12)} if name == "dpo" else {"num_generations": 4}
        return {"dpo": dpo, "grpo": grpo}[name](folder, adapter if with_lora else None, **arguments)
    model = adapt("llama")
    model = get_peft_model(model, adapter) if with_lora else model
    rows = rows_of(random_ids(12, 16))
    if name == "few_steps":
        return few_steps(model, folder, rows, confidence_loss_weight=0.5, **arguments)
    rollouts = {"on_policy_fraction": 0.5, "rollout_prompt_length": 4}
    return trainer_of(model, folder, rows, stock_model("gpt2", seed=3), **rollouts, **arguments)


def save(trained, path):
    save_file({key: part.detach().clone() for key, part in trained.model.state_dict().items()}, path)


def on_processes(folder, num_processes):
    for name in NAMES:
        trained = trainer(name, folder / name, per_device_train_batch_size=4 // num_processes, max_steps=3)
        if PartialState().is_main_process:
            save(trained, folder / f"{name}-start.safetensors")
        trained.train()
        save(trained, folder / f"{name}-{PartialState().process_index}.safetensors")


class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(train):
    """How a process of its own ends: 0, or the negative number of the signal."""
    process = os.fork()
    if not process:
        status = 1
        try:
            train()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(label, folder, kind, killer=None, resume=None):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    part = trainer(label.removesuffix("-lora"), folder / f"{label}-{kind}", label.endswith("-lora"), **arguments)
    if killer is not None:
        part.add_callback(killer)
    part.train(resume_from_checkpoint=resume)
    save(part, folder / f"{label}-{kind}.safetensors")


def killed(folder):
    for label in (f"{name}{adapter}" for name in NAMES for adapter in ("", "-lora")):
        assert in_a_process(partial(run, label, folder, "whole")) == 0
        assert in_a_process(partial(run, label, folder, "killed", Killer())) == -signal.SIGKILL
        assert not (folder / f"{label}-killed.safetensors").exists()
        assert in_a_process(partial(run, label, folder, "killed", resume=True)) == 0


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        killed(Path(sys.argv[2]))
    else:
        on_processes(Path(sys.argv[2]), int(sys.argv[3]))
