"""A run that was killed and resumed is the run that was never killed; what can't be resumed from is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from training_script import read_log, train
from transformers import EarlyStoppingCallback

from bd3lm_hf import BD3LMForMaskedLM


# Six steps per epoch, checkpoints after steps 4, 8 and 12, evaluations after 3, 6, 9, 12 and 14.
RUN = {
    "model": {"hidden_dropout": 0.2},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "noise_interval_search_every": 2,
    "max_steps": 14,
    "save_total_limit": 1,
}
# How a run is killed, and the step of the checkpoint that it goes on from.
KILLS = {
    "in_the_middle_of_an_epoch": (10, 8),
    "after_the_first_step_of_an_epoch": (13, 12),
    "while_writing_the_weights": (["model.safetensors", "checkpoint-8"], 4),
    "while_writing_the_average": (["ema.safetensors", "checkpoint-8"], 4),
    "while_writing_the_optimizer": (["optimizer.pt", "checkpoint-8"], 4),
    "while_writing_the_random_state": (["rng_state.pth", "checkpoint-8"], 4),
    "while_writing_the_state": (["trainer_state.json", "checkpoint-8"], 4),
    "while_deleting_an_old_checkpoint": ([], 8),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of an uninterrupted run, and of each way to be killed and resumed by a new process."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [{**RUN, "output_dir": str(folder / "uninterrupted")}]
    for name, (kill, _) in KILLS.items():
        jobs.append({**RUN, "output_dir": str(folder / name), "kill": kill})
        jobs.append({**RUN, "output_dir": str(folder / name), "resume": True})
    # A whole checkpoint is written again, by a run that goes on from an earlier one.
    again = {**RUN, "output_dir": str(folder / "again"), "save_total_limit": None}
    jobs.append({**again, "kill": 10})
    again["resume"] = str(folder / "again" / "checkpoint-4")
    jobs.append({**again, "kill": ["optimizer.pt", "checkpoint-8", 1.0]})
    jobs.append({**again, "resume": True})
    Path(folder, "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("training_script.py")
    # One thread: sums of floats depend on how they are split.
    subprocess.run(
        [sys.executable, script, folder / "jobs.json"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return folder


@pytest.fixture
def whole_checkpoint(runs, tmp_path):
    return Path(shutil.copytree(runs / "uninterrupted" / "checkpoint-14", tmp_path / "checkpoint-14"))


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_and_resumed_run_is_the_uninterrupted_run(runs, name):
    expected, killed = read_log(runs / "uninterrupted"), read_log(runs / f"{name}-killed")
    resumed = read_log(runs / name)[len(killed) :]
    assert killed == expected[: len(killed)]
    # The losses, the evaluations, the intervals in force, the average after each step.
    assert resumed[0]["step"] == KILLS[name][1] + 1
    assert resumed == [entry for entry in expected if entry["step"] > KILLS[name][1]]
    for file in ("model.safetensors", "config.json"):
        assert (runs / name / "final" / file).read_bytes() == (runs / "uninterrupted" / "final" / file).read_bytes()


def test_a_whole_checkpoint_that_was_half_overwritten_is_passed_over(runs):
    expected, log = read_log(runs / "uninterrupted"), read_log(runs / "again")
    starts = [index for index, entry in enumerate(log) if index == 0 or entry["step"] < log[index - 1]["step"]]
    assert [log[index]["step"] for index in starts] == [1, 5, 5]
    assert log[starts[-1] :] == [entry for entry in expected if entry["step"] > 4]


def test_the_compared_runs_meet_dropout_evaluations_and_a_chosen_interval(runs):
    log = read_log(runs / "uninterrupted")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 15))
    assert [entry["step"] for entry in log if "eval_nelbo" in entry] == [3, 6, 9, 12, 14]
    assert [entry["step"] for entry in log if "noise_interval_beta" in entry] == [3, 9, 14]
    assert log[0]["interval"] == [0.001, 1.0] != log[-1]["interval"]
    assert len({entry["ema"] for entry in log if "loss" in entry}) == 14
    config = json.loads((runs / "uninterrupted" / "final" / "config.json").read_text())
    assert config["hidden_dropout"] == 0.2 and config["noise_interval"] == log[-1]["interval"]


def test_the_last_checkpoint_stays_until_the_next_one_is_whole(runs):
    left = {name: {folder.name for folder in (runs / f"{name}-killed").glob("checkpoint-*")} for name in KILLS}
    for name, (kill, step) in KILLS.items():
        half_written = {"checkpoint-8"} if isinstance(kill, list) else set()
        half_deleted = {"checkpoint-4"} if kill == [] else set()
        assert left[name] == {f"checkpoint-{step}"} | half_written | half_deleted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("while_writing_the_weights", "it has no trainer_state.json, which is written last"),
        ("while_writing_the_optimizer", "it has no trainer_state.json, which is written last"),
        ("while_writing_the_state", "trainer_state.json is cut short"),
    ],
)
def test_a_half_written_checkpoint_is_refused(runs, name, message, tmp_path):
    with pytest.raises(ValueError, match=f"checkpoint-8.*is no whole checkpoint: {message}"):
        train(tmp_path, resume=str(runs / f"{name}-killed" / "checkpoint-8"), **RUN)


def test_a_half_deleted_checkpoint_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="is no whole checkpoint: it has no state of the optimizer"):
        train(tmp_path, resume=str(runs / "while_deleting_an_old_checkpoint-killed" / "checkpoint-4"), **RUN)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_that_was_copied_in_part_is_refused(whole_checkpoint, file):
    path = whole_checkpoint / file
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"is no whole checkpoint: {file} is cut short"):
        train(whole_checkpoint.parent / "resumed", resume=str(whole_checkpoint), **RUN)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is True, but there is no whole checkpoint in"):
        train(whole_checkpoint.parent, resume=True, **RUN)


def test_a_checkpoint_of_another_architecture_is_refused_before_any_step(whole_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="of another architecture than the model: hidden_size 32 there, 16 here"):
        train(tmp_path / "other", resume=str(whole_checkpoint), **{**RUN, "model": {"hidden_size": 16}})
    assert not (tmp_path / "other" / "log_0.jsonl").exists()


def test_a_checkpoint_without_an_average_or_with_that_of_other_weights_is_refused(whole_checkpoint, tmp_path):
    # Changed by hand, and not by accident.
    (whole_checkpoint / "checkpoint_manifest.json").unlink()
    path = whole_checkpoint / "ema.safetensors"
    average = load_file(path)
    average["model.norm.gain"] = average.pop("model.norm.weight")
    save_file(average, path, {"num_averaged": "12"})
    with pytest.raises(ValueError, match="other weights than the model trains: .*model.norm.gain"):
        train(tmp_path / "resumed", resume=str(whole_checkpoint), **RUN)
    path.unlink()
    with pytest.raises(ValueError, match="holds no moving average"):
        train(tmp_path / "resumed", resume=str(whole_checkpoint), **RUN)


@pytest.fixture
def worse_and_worse(tmp_path):
    """A model that starts at the uniform distribution and learns random texts by heart is at its best at first."""
    torch.manual_seed(0)
    return {
        "output_dir": tmp_path,
        "model": BD3LMForMaskedLM(tiny_config()),
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "nelbo",
    }


def test_the_best_model_is_exported_with_its_own_average(tmp_path, worse_and_worse):
    trainer = train(max_steps=9, **worse_and_worse)
    nelbo = [entry["eval_nelbo"] for entry in read_log(tmp_path) if "eval_nelbo" in entry]
    assert nelbo[0] < min(nelbo[1:]) and trainer.state.best_global_step == 3
    average = load_file(tmp_path / "checkpoint-3" / "ema.safetensors")
    trained = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    exported = BD3LMForMaskedLM.from_pretrained(tmp_path / "final").state_dict()
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert not all(torch.equal(exported[name], trained[name]) for name in average)
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(nelbo[0], rel=1e-6)


def test_training_stops_early_when_the_likelihood_does_not_improve(worse_and_worse):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = train(max_steps=30, callbacks=[stop], **worse_and_worse)
    assert trainer.state.best_global_step == 3 and trainer.state.global_step == 9
