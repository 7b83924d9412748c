"""What follows training survives kills, with adapters too, and runs on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("post_training_script.py")
NAMES = ("distillation", "few_steps", "dpo", "grpo")


def launch(*arguments, start=()):
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    # One thread: sums of floats depend on how they are split.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, *start, SCRIPT, *arguments], check=True, env=env)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, start in (("one", ()), ("two", launcher)):
        (tmp_path / name).mkdir()
        launch("processes", tmp_path / name, "2" if start else "1", start=start)
    for name in NAMES:
        one, two, other = (load_file(tmp_path / f"{path}.safetensors") for path in _paths(name))
        start = load_file(tmp_path / "one" / f"{name}-start.safetensors")
        assert any((two[key] - weights).abs().max() > 1e-4 for key, weights in start.items())
        for key, weights in one.items():
            assert torch.equal(two[key], other[key])
            # Rewards are of texts that each process draws by itself.
            if name != "grpo":
                torch.testing.assert_close(two[key], weights, atol=2e-5, rtol=1e-3)


def _paths(name):
    return f"one/{name}-0", f"two/{name}-0", f"two/{name}-1"


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not_with_adapters_too(tmp_path):
    launch("kills", tmp_path)
    for name in NAMES:
        for label in (name, f"{name}-lora"):
            whole, killed = (load_file(tmp_path / f"{label}-{kind}.safetensors") for kind in ("whole", "killed"))
            assert whole.keys() == killed.keys()
            assert all(torch.equal(part, killed[key]) for key, part in whole.items()), label
