"""Distillation and DPO on two processes are those on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    script = Path(__file__).with_name("post_training_script.py")
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(script.parent)])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in (("one", []), ("two", launcher)):
        (tmp_path / name).mkdir()
        count = "2" if start else "1"
        subprocess.run([sys.executable, *start, script, tmp_path / name, count], check=True, env=env)
    for name in ("distillation", "dpo"):
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        for key, weights in one.items():
            torch.testing.assert_close(two[key], weights, atol=2e-5, rtol=1e-3)
