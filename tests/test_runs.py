"""A run knows its own checkpoints and its end, notices what was damaged, and writes alone into its folder."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from training_script import examples, random_lengths, read_log, train
from transformers import EarlyStoppingCallback, TrainerCallback

from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments
from bd3lm_hf.cli import main
from bd3lm_hf.training.checkpoints import MANIFEST_FILE, last_complete_checkpoint, what_is_missing
from bd3lm_hf.training.runs import RUN_FILE, sole_writer


# Three steps per epoch, checkpoints after steps 2, 4, ...
RUN = {
    "lengths": [16] * 12,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
    "eval_steps": 4,
    "max_steps": 8,
    "model": {"hidden_dropout": 0.2},
}
# How long a run is.
LENGTHS = {
    "within an epoch": {"max_steps": 8},
    "to the end of an epoch": {"max_steps": 6},
    "in epochs and a half": {"max_steps": -1, "num_train_epochs": 2.5},
    "with a falling learning rate": {"max_steps": 7, "lr_scheduler_type": "cosine"},
    "with a block size due after its end": {"max_steps": 8, "block_size_schedule": {0: 8, 8: 2}},
    "evaluated at epoch ends": {"eval_strategy": "epoch", "save_total_limit": 1},
    "evaluated at its start": {"eval_on_start": True, "noise_interval_search_every": 2},
}


class Died(Exception):
    pass


class DieAt(TrainerCallback):
    """As a kill after a step, before that is logged, for a test that goes on in the same process."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Died


def die(folder, step, **arguments):
    with pytest.raises(Died):
        train(folder, callbacks=[DieAt(step)], **{**RUN, **arguments})


def saved(folder):
    """The files of the model that a run ends with."""
    names = ("model.safetensors", "config.json")
    return {name: (folder / "final" / name).read_bytes() for name in names}


def steps(folder):
    """The steps that were taken in all runs in a folder, in their order."""
    return [entry["step"] for entry in read_log(folder) if "loss" in entry]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder, **RUN)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# the end of a run


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_that_was_at_its_end_takes_no_further_step(name, tmp_path):
    arguments = {**RUN, **LENGTHS[name]}
    train(tmp_path, **arguments)
    expected, taken = saved(tmp_path), steps(tmp_path)
    shutil.rmtree(tmp_path / "final")
    trainer = train(tmp_path, resume=True, **arguments)
    assert saved(tmp_path) == expected
    assert steps(tmp_path) == taken and trainer.state.global_step == taken[-1] == trainer.state.max_steps
    # There was no loss that a mean could be told of.
    assert "train_loss" not in trainer.state.log_history[-1]
    # As a kill may leave it, to which Trainer adds.
    (tmp_path / "all_results.json").write_text("")
    trainer.save_metrics("train", {"steps": 8})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"steps": 8}


def test_a_run_that_stopped_early_takes_no_further_step_unless_it_is_given_more_patience(tmp_path):
    arguments = {**RUN, "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "nelbo"}
    arguments["max_steps"] = 30

    def stop(patience):
        return EarlyStoppingCallback(patience)

    train(tmp_path, callbacks=[stop(2)], **arguments)
    expected, taken = saved(tmp_path), steps(tmp_path)
    assert taken[-1] < 20
    train(tmp_path, callbacks=[stop(2)], resume=True, **arguments)
    assert saved(tmp_path) == expected and steps(tmp_path) == taken
    train(tmp_path, callbacks=[stop(4)], resume=True, **arguments)
    assert steps(tmp_path)[len(taken)] == taken[-1] + 1


def test_patience_is_what_it_was_before_the_interruption(tmp_path):
    arguments = {**RUN, "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "nelbo"}
    arguments |= {"max_steps": 30, "callbacks": [EarlyStoppingCallback(2)]}
    train(tmp_path / "uninterrupted", **arguments)
    last = steps(tmp_path / "uninterrupted")[-1]
    with pytest.raises(Died):
        train(tmp_path / "killed", **{**arguments, "callbacks": [EarlyStoppingCallback(2), DieAt(last - 1)]})
    train(tmp_path / "killed", resume=True, **{**arguments, "callbacks": [EarlyStoppingCallback(2)]})
    assert steps(tmp_path / "killed")[-1] == last
    assert saved(tmp_path / "killed") == saved(tmp_path / "uninterrupted")


def test_a_run_that_is_given_more_steps_takes_them(run, tmp_path):
    train(tmp_path, **{**RUN, "max_steps": 10})
    train(run, resume=True, **{**RUN, "max_steps": 10})
    assert steps(run) == [*range(1, 11)] and saved(run) == saved(tmp_path)


@pytest.mark.parametrize("name", ["evaluated at epoch ends", "evaluated at its start"])
def test_a_killed_run_is_evaluated_as_often_as_an_uninterrupted_one(name, tmp_path):
    arguments = {**RUN, "save_steps": 3, **LENGTHS[name]}
    train(tmp_path / "uninterrupted", **arguments)
    die(tmp_path / "killed", 5, **arguments)
    train(tmp_path / "killed", resume=True, **arguments)
    assert saved(tmp_path / "killed") == saved(tmp_path / "uninterrupted")
    state = [json.loads((tmp_path / run / "checkpoint-8" / "trainer_state.json").read_text()) for run in
             ("uninterrupted", "killed")]  # fmt: skip
    evaluations = [[entry["step"] for entry in run["log_history"] if "eval_nelbo" in entry] for run in state]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) > 2


def test_a_stream_that_is_read_again_is_gone_on_with_where_it_was_left(tmp_path):
    arguments = {"stream": True, "lengths": [16] * 10, "gradient_accumulation_steps": 2, "max_steps": 5}
    train(tmp_path / "uninterrupted", **{**RUN, **arguments})
    die(tmp_path / "killed", 5, **arguments)
    train(tmp_path / "killed", resume=True, **{**RUN, **arguments})
    assert steps(tmp_path / "killed") == [*range(1, 6)]
    assert saved(tmp_path / "killed") == saved(tmp_path / "uninterrupted")


def test_one_trainer_goes_on_after_an_error_within_a_step(tmp_path):
    """With the block size, the noise interval and the noise that were in force at the checkpoint."""
    arguments = {**RUN, "gradient_accumulation_steps": 2, "eval_steps": 3, "block_size_schedule": {3: 2}}
    expected = train(tmp_path / "uninterrupted", **arguments)

    class DieWithin(TrainerCallback):
        num_deaths = 0

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and self.num_deaths < 2:
                self.num_deaths += 1
                raise Died

    settings = {k: v for k, v in arguments.items() if k not in ("model", "lengths")}
    settings |= {"logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "ema_decay": 0.8}
    settings |= {"eval_strategy": "steps", "seed": 5, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = BD3LMTrainer(
        random_model(attn_implementation="sdpa", **RUN["model"]),
        BD3LMTrainingArguments(str(tmp_path / "killed"), **settings),
        train_dataset=examples(RUN["lengths"], seed=0),
        eval_dataset=examples(random_lengths(13), seed=1),
        callbacks=[DieWithin()],
    )
    with pytest.raises(Died):
        trainer.train()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    assert trainer.config.block_size == 2
    # From step 2, and then from the very step that it died in.
    with pytest.raises(Died):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name
    assert trainer.config.noise_interval == expected.config.noise_interval


# whose checkpoints


def test_a_new_run_does_not_go_on_from_an_older_one_in_its_folder(run, tmp_path):
    die(run, 1, seed=6, lengths=[16] * 12)
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* of the run that was started there last .*-8"):
        train(run, resume=True, **{**RUN, "seed": 6})
    die(run, 3, seed=6)
    train(run, resume=True, **{**RUN, "seed": 6})
    train(tmp_path / "alone", **{**RUN, "seed": 6})
    assert saved(run) == saved(tmp_path / "alone")
    assert steps(run)[8:] == [1, 2, *range(3, 9)]


def test_a_run_from_a_named_checkpoint_does_not_go_on_from_what_came_after_that(run):
    with pytest.raises(Died):
        train(run, resume=str(run / "checkpoint-4"), callbacks=[DieAt(5)], **{**RUN, "learning_rate": 2e-2})
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    train(run, resume=True, **{**RUN, "learning_rate": 2e-2})
    assert steps(run)[8:] == [*range(5, 9)]
    # What it wrote itself, and what it went on from, is its own.
    assert last_complete_checkpoint(run) == str(run / "checkpoint-8")
    shutil.rmtree(run / "checkpoint-8")
    shutil.rmtree(run / "checkpoint-6")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_a_new_run_keeps_its_first_checkpoint_beside_those_of_an_older_one(run):
    for folder in run.glob("checkpoint-*"):
        # As a copy from a machine whose clock is fast.
        os.utime(folder, (2e9, 2e9))
    die(run, 3, seed=6, save_total_limit=1)
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_best_model_is_not_taken_from_an_older_run(run):
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-1")
    trainer = train(run, **{**RUN, "eval_steps": 1, "metric_for_best_model": "nelbo", "greater_is_better": True})
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None


def test_nothing_of_an_older_checkpoint_is_left_in_a_new_one_of_its_name(run):
    (run / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir()
    (run / "checkpoint-2" / "adapter_model.safetensors").touch()
    die(run, 3, seed=6)
    names = {path.name for path in (run / "checkpoint-2").iterdir()}
    assert names == {path.name for path in (run / "checkpoint-8").iterdir()}


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(finished, tmp_path):
    die(tmp_path, 5)
    for path in (tmp_path / RUN_FILE, *tmp_path.glob(f"*/{MANIFEST_FILE}")):
        path.unlink()
    train(tmp_path, resume=True, **RUN)
    assert steps(tmp_path) == [*range(1, 9)]
    assert saved(tmp_path) == saved(finished)


# whole checkpoints


def drop_tensor(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def drop_optimizer_state(checkpoint):
    optimizer = torch.load(checkpoint / "optimizer.pt")
    del optimizer["state"][3]
    torch.save(optimizer, checkpoint / "optimizer.pt")


def drop_moment(checkpoint):
    optimizer = torch.load(checkpoint / "optimizer.pt")
    del optimizer["state"][0]["exp_avg_sq"]
    torch.save(optimizer, checkpoint / "optimizer.pt")


def drop(name):
    return lambda checkpoint: (checkpoint / name).unlink()


# What a checkpoint may lack, and how that is told where there is a manifest, and where there is none.
LACKS = {
    "a tensor": (drop_tensor, "model.safetensors is cut short", "model.norm.weight is missing"),
    "an optimizer's state": (drop_optimizer_state, "optimizer.pt is cut short", "optimizer.pt has no state.*3"),
    "a moment": (drop_moment, "optimizer.pt is cut short", "optimizer.pt has no state, or not all, .*0"),
    "random state": (drop("rng_state.pth"), "rng_state.pth is missing", "it has no rng_state.pth"),
    "weights": (drop("model.safetensors"), "model.safetensors is missing", "it has no weights"),
    "an average": (drop("ema.safetensors"), "ema.safetensors is missing", "holds no moving average"),
    "a scheduler": (drop("scheduler.pt"), "scheduler.pt is missing", "it has no state of the optimizer"),
}


@pytest.mark.parametrize("name", LACKS)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_checkpoint_that_lacks_something_is_not_whole(name, has_manifest, run):
    damage, with_manifest, without_manifest = LACKS[name]
    damage(run / "checkpoint-8")
    if not has_manifest:
        (run / "checkpoint-8" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=with_manifest if has_manifest else without_manifest):
        train(run, resume=str(run / "checkpoint-8"), **RUN)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


FILES = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.3, 0.99])
def test_a_flipped_bit_is_noticed(name, place, run):
    path = run / "checkpoint-8" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint-8.*is no whole checkpoint: {name} is not as it was written"):
        train(run, resume=str(run / "checkpoint-8"), **RUN)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_the_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(run, caplog):
    expected = saved(run)
    path = run / "checkpoint-8" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)
    (run / "checkpoint-6" / MANIFEST_FILE).write_text("{")
    train(run, resume=True, **RUN)
    assert steps(run) == [*range(1, 9), *range(5, 9)] and saved(run) == expected
    assert what_is_missing(run / "checkpoint-8") is None


def test_texts_and_code_in_a_checkpoint_may_change(run):
    (run / "checkpoint-8" / "README.md").write_text("Mine.")
    (run / "checkpoint-8" / "modeling_bd3lm.py").write_text("# Mine.\n")
    (run / "checkpoint-8" / "notes.txt").write_text("Mine.")
    assert what_is_missing(run / "checkpoint-8") is None


@pytest.mark.parametrize("text", ["[]", "null", '"a"', '{"global_step": "8"}', "{"])
def test_a_state_of_another_kind_is_named(run, text):
    (run / "checkpoint-8" / MANIFEST_FILE).unlink()
    (run / "checkpoint-8" / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match="is no whole checkpoint: trainer_state.json "):
        train(run, resume=str(run / "checkpoint-8"), **RUN)


# one run at a time


def held_by_a_child(folder, with_worker=False):
    """The id of a process that holds a folder, with a child of its own or without."""
    ready, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.setsid()
        with sole_writer(folder):
            if not with_worker or os.fork() == 0:
                os.write(write, b"!")
            signal.pause()
    os.read(ready, 1)
    return holder


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_dead(tmp_path, capsys):
    holder = held_by_a_child(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` must be a folder that no other run writes into, but another"):
        train(tmp_path, **RUN)
    assert not (tmp_path / "checkpoint-2").exists()
    assert main(["train", "--data", "builtin", "--output_dir", str(tmp_path)]) == 2
    assert "bd3lm train: error: `output_dir` must be a folder that no other run" in capsys.readouterr().err
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    die(tmp_path, 1)


def test_workers_of_a_dead_run_do_not_keep_its_folder(tmp_path):
    holder = held_by_a_child(tmp_path, with_worker=True)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with sole_writer(tmp_path):
            pass
    finally:
        os.killpg(holder, signal.SIGKILL)


def test_a_second_run_in_another_thread_is_refused(tmp_path):
    errors = []

    def second():
        try:
            train(tmp_path, **RUN)
        except ValueError as error:
            errors.append(str(error))

    with sole_writer(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        # The thread that holds it, as `bd3lm train` does, trains.
        die(tmp_path, 1)
    assert len(errors) == 1 and "another run is going on" in errors[0]


def test_an_attempt_that_started_no_run_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="there is no whole checkpoint"), sole_writer(tmp_path / "new"):
        last_complete_checkpoint(tmp_path / "new")
    assert not (tmp_path / "new").exists()
