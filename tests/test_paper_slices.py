"""Slices of benchmarks/paper run by themselves, without `datasets`, and the report puts them together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import report, slices
from benchmarks.paper.workbench import Deadline, OutOfTime


ROOT = Path(__file__).parents[1]
WITHOUT_DATASETS = """
import runpy, sys
sys.modules["datasets"] = None  # import datasets raises ImportError from here on
runpy.run_module("benchmarks.paper", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"No. {number}:\n{'word ' * (number % 9)}end." for number in range(700)))
    return path


def flags(text_file, name, folder):
    given = {"--scale": "tiny", "--data": text_file, "--slice": name, "--output_dir": folder / f"models-{name}"}
    return [str(part) for pair in {**given, "--results": folder / "results"}.items() for part in pair]


def run_without_datasets(text_file, name, folder):
    subprocess.run([sys.executable, "-c", WITHOUT_DATASETS, *flags(text_file, name, folder)], check=True, cwd=ROOT)
    return json.loads((folder / "results" / f"slice.tiny.{name}.seed0.json").read_text())


@pytest.fixture(scope="module")
def small_blocks(text_file, tmp_path_factory):
    """A folder with one slice, and what it holds."""
    folder = tmp_path_factory.mktemp("slice")
    return folder, run_without_datasets(text_file, "blocks-1-4", folder)


def test_a_slice_trains_and_measures_without_datasets(small_blocks):
    folder, document = small_blocks
    assert document["experiments"] == {"likelihood": "done", "generation": "done"}
    records = {name: entry for name, entry in document["entries"].items() if name.endswith("record")}
    # All arms but the base, which the continued ones go on from, have seen equally many tokens.
    base = next(entry["num_tokens"] for name, entry in records.items() if "base" in name)
    tokens = {
        entry["num_tokens"] + base * ("continued" in name) for name, entry in records.items() if "base" not in name
    }
    assert len(records) == 4 and len(tokens) == 1
    assert "datasets" not in document["versions"] and str(folder) not in json.dumps(document)


def test_the_report_takes_means_over_the_seeds_of_slices(small_blocks, tmp_path):
    _, document = small_blocks
    first, second = json.dumps(document), json.dumps(document).replace("-seed0", "-seed1")
    second = json.loads(second)
    second["seed"] = 1
    arm = next(entry for name, entry in second["entries"].items() if name.startswith("gpt2") and "average" in entry)
    expected = json.loads(first)["entries"]["gpt2-seed0/record"]["average"]["nelbo"]
    arm["average"]["nelbo"] = expected + 0.5
    (tmp_path / "slice.tiny.blocks-1-4.seed0.json").write_text(first)
    (tmp_path / "slice.tiny.blocks-1-4.seed1.json").write_text(json.dumps(second))
    merged = report.documents(tmp_path, "tiny")
    assert list(merged) == ["likelihood", "generation"] and merged["likelihood"]["seeds"] == [0, 1]
    results = merged["likelihood"]["results"]
    assert list(results) == ["autoregressive", "1", "4"]
    assert results["autoregressive"]["nelbo"]["values"] == [expected, expected + 0.5]
    assert results["autoregressive"]["nelbo"]["mean"] == pytest.approx(expected + 0.25)
    page = report.page({}, merged)
    assert "--slice blocks-1-4" in page and "seeds 0, 1" in page and "nan" not in page and "Not run** yet" not in page
    report.EXPERIMENTS["likelihood"].plot(merged["likelihood"], tmp_path / "plot.png")

    # An arm that fewer seeds have is left out, and a seed without an arm that the others have.
    del second["entries"]["gpt2-seed1/record"]
    (tmp_path / "slice.tiny.blocks-1-4.seed1.json").write_text(json.dumps(second))
    likelihood = report.documents(tmp_path, "tiny")["likelihood"]
    assert likelihood["seeds"] == [0, 1] and list(likelihood["results"]) == ["1", "4"]
    second["entries"] = {}
    (tmp_path / "slice.tiny.blocks-1-4.seed1.json").write_text(json.dumps(second))
    likelihood = report.documents(tmp_path, "tiny")["likelihood"]
    assert likelihood["seeds"] == [0] and len(likelihood["results"]) == 3
    assert "of **one seed**" in report.page({}, {"likelihood": likelihood}).lower()

    second["text"] = "another"
    (tmp_path / "slice.tiny.blocks-1-4.seed1.json").write_text(json.dumps(second))
    with pytest.raises(ValueError, match="`results` must hold slices of one text and one size, but got several in"):
        report.documents(tmp_path, "tiny")


def test_what_there_is_no_time_for_or_fails_says_so_and_the_rest_goes_on(text_file, tmp_path, monkeypatch):
    path = slices.main([*flags(text_file, "blocks", tmp_path), "--seconds", "0"])
    states = json.loads(path.read_text())["experiments"]
    assert all(state.startswith("no time left for training") for state in states.values()) and len(states) == 2

    def fail(*arguments):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(slices.EXPERIMENTS["likelihood"], "measure", fail)
    monkeypatch.setattr(slices.EXPERIMENTS["generation"], "measure", lambda *arguments: {})
    states = json.loads(slices.main(flags(text_file, "blocks", tmp_path)).read_text())["experiments"]
    assert states == {"likelihood": "fails: RuntimeError: no memory", "generation": "done"}


def test_a_training_that_takes_too_long_ends():
    class State:
        global_step, max_steps = 3, 9

    Deadline(float("inf"), "training").on_step_end(None, State, None)
    with pytest.raises(OutOfTime, match="training block 4, after 3 of 9 steps"):
        Deadline(0.0, "training block 4").on_step_end(None, State, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", slices.SLICES)
def test_every_slice_needs_no_other_one(name, text_file, tmp_path):
    document = run_without_datasets(text_file, name, tmp_path)
    assert set(document["experiments"].values()) == {"done"}
    assert set(report.documents(tmp_path / "results", "tiny")) == set(slices.SLICES[name])
