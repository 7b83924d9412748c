"""Whoever writes a file or a folder leaves the old or the new there, and takes nothing away unasked."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import random_model
from datasets import Dataset
from transformers import PreTrainedModel

from bd3lm_hf import BD3LMForMaskedLM, BD3LMTrainer, BD3LMTrainingArguments
from bd3lm_hf.cli import main
from bd3lm_hf.data import replacing
from bd3lm_hf.data.replacing import check_folder, replaced_file, replaced_folder, write_text
from bd3lm_hf.evaluation.likelihood import Likelihood
from bd3lm_hf.hub.conversion import convert_checkpoint


STALE = ("config.json", "adapter_*")


def content(folder):
    """What lies at the top of a folder, by name."""
    return {path.name: path.read_text() if path.is_file() else sorted(os.listdir(path)) for path in folder.iterdir()}


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(params=["exchanged", "renamed", "in place"])
def way(request, monkeypatch, tmp_path):
    """The three ways in which a folder gets its place, and what is the case anyway."""
    if request.param == "renamed":
        monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)
    if request.param == "in place":
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
    return request.param


@pytest.fixture
def out(tmp_path):
    """A folder that holds an adapter, a folder, a link and a log."""
    write(tmp_path / "out", adapter_config_json="old", weights="old", log="kept")
    write(tmp_path / "out" / "runs", events="kept")
    (tmp_path / "out" / "link").symlink_to("log")
    return tmp_path / "out"


# Files.


def test_a_file_that_is_not_written_to_its_end_leaves_the_old_one(tmp_path):
    path = tmp_path / "figures.json"
    write_text(path, "old")
    path.chmod(0o640)
    with pytest.raises(KeyboardInterrupt), replaced_file(path) as new:
        assert new.suffix == ".json" and new.parent == tmp_path
        new.write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"figures.json": "old"}
    (tmp_path / "link").symlink_to("figures.json")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "new" and len(content(tmp_path)) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_text("/dev/null", "nowhere")


def test_figures_are_written_whole_by_evaluation_quality_and_plots(tmp_path, monkeypatch):
    likelihood = Likelihood(**dict.fromkeys(Likelihood.__dataclass_fields__, 1) | {"num_bytes": None})
    for name in ("likelihood.json", "quality.json", "plot.svg"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        likelihood.to_json(tmp_path / "likelihood.json")
    assert main(["plot", "attention", "--output", str(tmp_path / "plot.svg")]) == 2
    assert set(content(tmp_path).values()) == {"old"} and len(content(tmp_path)) == 3


# Folders.


def test_a_folder_that_holds_something_and_a_file_are_refused(out, tmp_path):
    for path, message in (
        (out, "`dest` must be a new or an empty folder, but .* holds adapter_config.json and 4 more; `overwrite`"),
        (out / "log", "`dest` must be a folder, but .*log is a file; `overwrite`"),
        (out / "log" / "x" / "y", "`dest` must be in a folder, but .*log is a file"),
    ):
        before = content(out)
        with pytest.raises(ValueError, match=message), replaced_folder("dest", path):
            pytest.fail("was written")
        assert content(out) == before
    with pytest.raises(ValueError, match="must be in a folder"):
        check_folder("dest", out / "log" / "x", overwrite=True)
    check_folder("dest", out, what=("*.safetensors",))


def test_a_new_and_an_empty_folder_are_written_with_the_usual_rights(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o750)
    usual = stat.S_IMODE((tmp_path / "empty" / "usual").mkdir() or (tmp_path / "empty" / "usual").stat().st_mode)
    (tmp_path / "empty" / "usual").rmdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        with replaced_folder("dest", path) as new:
            write(new, config_json="new")
            assert not path.exists() or not any(path.iterdir())
        assert content(path) == {"config.json": "new"} and len(list(path.parent.iterdir())) <= 2
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == usual
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o750


def test_overwriting_takes_away_what_is_stale_and_keeps_the_rest(way, out, tmp_path):
    events = (out / "runs" / "events").stat().st_ino
    with replaced_folder("dest", out, overwrite=True, stale=STALE) as new:
        write(new, config_json="new", weights="new")
        (new / "runs2").mkdir()
    assert content(out) == {
        "config.json": "new",
        "weights": "new",
        "log": "kept",
        "link": "kept",
        "runs": ["events"],
        "runs2": [],
    }
    assert (out / "link").is_symlink() and (out / "runs" / "events").stat().st_ino == events
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Path.cwd().exists() and (way != "in place" or Path.cwd().samefile(out))


def test_a_folder_takes_the_place_of_a_file_where_it_is_told_to(out, monkeypatch):
    for exchanges in (True, False):
        if not exchanges:
            monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)
        (out / f"file{exchanges}").write_text("old")
        with replaced_folder("dest", out / f"file{exchanges}", overwrite=True) as new:
            write(new, config_json="new")
        assert content(out / f"file{exchanges}") == {"config.json": "new"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_an_interruption_leaves_the_old_folder(way, out, tmp_path):
    before = content(out)
    for overwrite in (True,):
        with pytest.raises(KeyboardInterrupt), replaced_folder("dest", out, overwrite=overwrite, stale=STALE) as new:
            write(new, config_json="new")
            raise KeyboardInterrupt
    assert content(out) == before and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_put_in_place_leaves_the_old_folder(out, monkeypatch):
    monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)
    before, rename = content(out), os.rename

    def fail_once(source, target):
        if Path(target) == out and "new" in os.listdir(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="no"), replaced_folder("dest", out, overwrite=True) as new:
        write(new, new="new")
    assert content(out) == before and len(list(out.parent.iterdir())) == 1


def test_a_link_to_a_folder_stays_a_link(out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    with replaced_folder("dest", tmp_path / "link", overwrite=True, stale=STALE) as new:
        write(new, config_json="new")
    assert (tmp_path / "link").is_symlink() and content(out)["config.json"] == "new"


def test_another_process_that_was_faster_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="`dest` must be a new"), replaced_folder("dest", tmp_path / "out") as new:
        write(new, config_json="mine")
        write(tmp_path / "out", config_json="yours")
    assert content(tmp_path / "out") == {"config.json": "yours"} and len(list(tmp_path.iterdir())) == 1


WRITER = """
import runpy
import sys
from itertools import count
from pathlib import Path
# The file alone: the package would load torch.
replaced_folder = runpy.run_path(sys.argv[1])["replaced_folder"]
for number in count(1):
    with replaced_folder("dest", sys.argv[2], overwrite=True, stale=["*"]) as new:
        for name in range(20):
            Path(new, f"{name}.txt").write_text(str(number))
    if number == 1:
        # Before, there may be none of either.
        print("ready", flush=True)
"""


def test_a_kill_at_any_time_leaves_the_old_or_the_new(tmp_path):
    numbers = set()
    for kill in range(20):
        command = [sys.executable, "-c", WRITER, replacing.__file__, str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(random.Random(kill).uniform(0.02, 0.2))
            process.send_signal(signal.SIGKILL)
        files = content(tmp_path / "out")
        assert len(files) == 20 and len(set(files.values())) == 1
        numbers |= set(files.values())
    assert len(numbers) > 1


# Who writes folders.


def test_convert_refuses_a_file_and_a_folder_that_holds_something(find_parity_folder, tmp_path, capsys):
    source, out = str(find_parity_folder("bd3lm_block4")), tmp_path / "out"
    write(out, adapter_config_json="{}", notes="mine", tokenizer_json="{}")
    (tmp_path / "file").write_text("mine")
    for path, message in ((out, "must be a new or an empty folder"), (tmp_path / "file", "is a file")):
        assert main(["convert", source, str(path)]) == 2
        error = capsys.readouterr().err
        assert f"`destination` {message}" in error or message in error and "--overwrite" in error
    assert content(out) == {"adapter_config.json": "{}", "notes": "mine", "tokenizer.json": "{}"}
    for path in (out, tmp_path / "file"):
        assert main(["convert", source, str(path), "--overwrite"]) == 0
        assert BD3LMForMaskedLM.from_pretrained(path).config.block_size == 4
    assert (out / "notes").read_text() == "mine"
    assert not (out / "adapter_config.json").exists() and not (out / "tokenizer.json").exists()


def test_a_conversion_that_is_interrupted_leaves_the_old_model(find_parity_folder, tmp_path, monkeypatch):
    source, out = find_parity_folder("bd3lm_block4"), tmp_path / "out"
    random_model(num_hidden_layers=1).save_pretrained(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save_pretrained = PreTrainedModel.save_pretrained

    def interrupted(self, folder, *args, **kwargs):
        save_pretrained(self, folder, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def trainer_of(model, output_dir):
    texts = Dataset.from_dict({"input_ids": [[(row + column) % 20 for column in range(12)] for row in range(8)]})
    arguments = BD3LMTrainingArguments(str(output_dir), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    return BD3LMTrainer(model, arguments, train_dataset=texts)


def test_a_trainer_leaves_nothing_of_another_model_beside_its_own(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        return get_peft_model(random_model(num_hidden_layers=1), LoraConfig(r=2, target_modules="all-linear"))

    model = random_model(num_hidden_layers=1)
    own = {
        "notes": "mine",
        "optimizer": "mine",
        "train_bd3lm.py": "mine",
        "model.py": "mine",
        "x.safetensors.old": "mine",
    }
    write(tmp_path, **own)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    weights = {"whole": {"model.safetensors"}, "adapter": {"adapter_model.safetensors"}}
    for kind, trained in (("whole", model), ("adapter", adapted()), ("whole", model)):
        trainer_of(trained, tmp_path).save_model()
        names = {path.name for path in tmp_path.iterdir()}
        assert {name for name in names - {*own} if "safetensors" in name} == weights[kind]
        assert ("adapter_config.json" in names, "config.json" in names) == (kind == "adapter", kind == "whole")
        assert {"training_summary.json", "training_args.bin"} <= names
        assert {name: (tmp_path / name).read_text() for name in own} == own
        assert not [name for name in names if name.startswith(".")]


def test_a_trainer_that_is_interrupted_while_it_saves_leaves_the_old_model(tmp_path, monkeypatch):
    old = random_model(seed=1, num_hidden_layers=1)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer = trainer_of(random_model(seed=2, num_hidden_layers=1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.torch.save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert not (tmp_path / ".saving").exists()


def test_a_model_is_not_saved_to_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`save_directory` must be a folder, but .*file is a file"):
        random_model(num_hidden_layers=1).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    "held", ["config.json", "adapter_config.json", "model-00001-of-00002.safetensors", "checkpoint-2"]
)
def test_train_and_demo_refuse_a_folder_with_a_model(tmp_path, held, capsys):
    (tmp_path / held).write_text(json.dumps({}))
    size = ["--max_steps", "1", "--output_dir", str(tmp_path)]
    for command in (["train", "--data", "builtin", *size], ["demo", *size]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "`--output_dir` must be a new or an empty folder" in error and held in error
    assert [path.name for path in tmp_path.iterdir()] == [held]
    (tmp_path / "file").write_text("mine")
    assert main(["train", "--data", "builtin", "--output_dir", str(tmp_path / "file"), "--overwrite"]) == 2
    assert "--output_dir must be a folder, but" in capsys.readouterr().err


def test_train_takes_a_folder_that_holds_something_else_or_that_it_is_told_to_go_on_in(tmp_path):
    from bd3lm_hf.cli.train import train_arguments

    (tmp_path / "nohup.out").write_text("mine")
    flags = ["--data", "builtin", "--output_dir", str(tmp_path)]
    assert train_arguments(flags)[2].output_dir == str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for more in (["--overwrite"], ["--resume_from_checkpoint", "last"], ["--model", str(tmp_path)]):
        assert train_arguments([*flags, *more])[2].output_dir == str(tmp_path)
