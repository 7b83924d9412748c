"""Slices of benchmarks/paper run by themselves, without `datasets`, and the report puts them together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import report, slices
from benchmarks.paper.scales import SCALES
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
    return folder, run_without_datasets(text_file, "blocks-4", folder)


def test_a_slice_trains_and_measures_without_datasets(small_blocks):
    folder, document = small_blocks
    assert document["experiments"] == {"likelihood": "done", "generation": "done"}
    records = {name: entry for name, entry in document["entries"].items() if name.endswith("record")}
    # All arms but the base, which the continued ones go on from, have seen equally many tokens.
    base = next(entry["num_tokens"] for name, entry in records.items() if "base" in name)
    tokens = {
        entry["num_tokens"] + base * ("continued" in name) for name, entry in records.items() if "base" not in name
    }
    assert len(records) == 3 and len(tokens) == 1
    assert "datasets" not in document["versions"] and str(folder) not in json.dumps(document)


def test_the_report_takes_means_over_the_seeds_of_slices(small_blocks, tmp_path):
    _, document = small_blocks
    first, second = json.dumps(document), json.dumps(document).replace("-seed0", "-seed1")
    second = json.loads(second)
    second["seed"] = 1
    arm = next(entry for name, entry in second["entries"].items() if name.startswith("gpt2") and "average" in entry)
    expected = json.loads(first)["entries"]["gpt2-seed0/record"]["average"]["nelbo"]
    arm["average"]["nelbo"] = expected + 0.5
    (tmp_path / "slice.tiny.blocks-4.seed0.json").write_text(first)
    (tmp_path / "slice.tiny.blocks-4.seed1.json").write_text(json.dumps(second))
    merged = report.documents(tmp_path, "tiny")
    assert list(merged) == ["likelihood", "generation"] and merged["likelihood"]["seeds"] == [0, 1]
    results = merged["likelihood"]["results"]
    assert list(results) == ["autoregressive", "4"]
    assert results["autoregressive"]["nelbo"]["values"] == [expected, expected + 0.5]
    assert results["autoregressive"]["nelbo"]["mean"] == pytest.approx(expected + 0.25)
    page = report.page({}, merged)
    assert "--slice blocks-4" in page and "seeds 0, 1" in page and "nan" not in page and "Not run** yet" not in page
    report.EXPERIMENTS["likelihood"].plot(merged["likelihood"], tmp_path / "plot.png")

    # An arm that fewer seeds have is left out, and a seed without an arm that the others have.
    del second["entries"]["gpt2-seed1/record"]
    (tmp_path / "slice.tiny.blocks-4.seed1.json").write_text(json.dumps(second))
    likelihood = report.documents(tmp_path, "tiny")["likelihood"]
    assert likelihood["seeds"] == [0, 1] and list(likelihood["results"]) == ["4"]
    second["entries"] = {}
    (tmp_path / "slice.tiny.blocks-4.seed1.json").write_text(json.dumps(second))
    likelihood = report.documents(tmp_path, "tiny")["likelihood"]
    assert likelihood["seeds"] == [0] and len(likelihood["results"]) == 2
    assert "of **one seed**" in report.page({}, {"likelihood": likelihood}).lower()

    second["text"] = "another"
    (tmp_path / "slice.tiny.blocks-4.seed1.json").write_text(json.dumps(second))
    with pytest.raises(ValueError, match="`results` must hold slices of one text and one size, but got several in"):
        report.documents(tmp_path, "tiny")


def test_what_there_is_no_time_for_or_fails_says_so_and_the_rest_goes_on(text_file, tmp_path, monkeypatch):
    path = slices.main([*flags(text_file, "blocks-16", tmp_path), "--seconds", "0"])
    states = json.loads(path.read_text())["experiments"]
    assert all(state.startswith("no time left for training") for state in states.values()) and len(states) == 2

    def fail(*arguments):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(slices.EXPERIMENTS["likelihood"], "measure", fail)
    monkeypatch.setattr(slices.EXPERIMENTS["generation"], "measure", lambda *arguments: {})
    states = json.loads(slices.main(flags(text_file, "blocks-16", tmp_path)).read_text())["experiments"]
    assert states == {"likelihood": "fails: RuntimeError: no memory", "generation": "done"}


def test_a_training_that_takes_too_long_ends():
    class State:
        global_step, max_steps = 3, 9

    Deadline(float("inf"), "training").on_step_end(None, State, None)
    with pytest.raises(OutOfTime, match="training block 4, after 3 of 9 steps"):
        Deadline(0.0, "training block 4").on_step_end(None, State, None)


# Of the scale "gpu", where no training was timed yet: tokens of a second by the operations of a step, at the rate that
# the compiled step has with three times the weights on an H200, a quarter off for the optimizer and smaller matrices.
MEASURED_TOKENS, MEASURED_SIZE, PART = 217_000, (768, 12, 50258, 1024), 0.75
# To read and to tokenize the text, to compile a step, and for all that is measured of the models of a slice.
SECONDS_OF_TEXT, SECONDS_TO_COMPILE, SECONDS_TO_MEASURE = 60, 40, 110


def operations(hidden_size, num_layers, vocab_size, length):
    """Of a token in training by block diffusion, as in `benchmarks/gpu/networks.py`."""
    layers, attention = 12 * num_layers * hidden_size**2, 6 * num_layers * hidden_size * length
    return 6 * (2 * layers + hidden_size * vocab_size / 2) + 2 * attention


def estimated_seconds(trained):
    """Of a slice that has trained these, had it been at the scale "gpu"."""
    scale = SCALES["gpu"]
    size = (scale.hidden_size, scale.num_layers, scale.vocab_size, scale.length)
    speed = PART * MEASURED_TOKENS * operations(*MEASURED_SIZE) / operations(*size)
    # A search gives a step other shapes once more.
    num_graphs = sum(1 + ("search" in name) for name in trained)
    whole = [2 if name.startswith("gpt2") else 1 for name in trained]
    num_tokens = sum(whole) * scale.num_steps * scale.batch_size * scale.length
    return SECONDS_OF_TEXT + SECONDS_TO_MEASURE + SECONDS_TO_COMPILE * num_graphs + num_tokens / speed


@pytest.mark.slow
@pytest.mark.parametrize("name", slices.SLICES)
def test_every_slice_needs_no_other_one_and_has_time_for_its_trainings(name, text_file, tmp_path):
    document = run_without_datasets(text_file, name, tmp_path)
    assert set(document["experiments"].values()) == {"done"}
    trained = [path.parent.name for path in tmp_path.glob(f"models-{name}/*/*/model")]
    # At least the base, and one that goes on from it.
    assert len(trained) > 1 and sum("base" in each for each in trained) == 1
    assert estimated_seconds(trained) < slices.SECONDS


def test_each_model_is_trained_on_25_million_tokens():
    scale = SCALES["gpu"]
    assert scale.num_base_steps == scale.num_steps
    assert (scale.num_base_steps + scale.num_steps) * scale.batch_size * scale.length > 25e6


@pytest.mark.slow
@pytest.mark.parametrize("experiment, whats", [("intervals-4", ("search", "fixed")), ("length-4", ("read", "write"))])
def test_what_several_slices_hold_of_an_experiment_is_put_together(experiment, whats, text_file, tmp_path):
    for what in whats:
        name = experiment.partition("-")[0]
        assert name not in report.documents(tmp_path / "results", "tiny")
        run_without_datasets(text_file, f"{experiment}-{what}", tmp_path)
    merged = report.documents(tmp_path / "results", "tiny")
    assert merged[name]["slices"] == sorted(f"{experiment}-{what}" for what in whats)
    assert report.EXPERIMENTS[name].section(merged[name])
    # What was trained twice is of one seed and one text, and so the same.
    first, second = (
        json.loads((tmp_path / "results" / f"slice.tiny.{experiment}-{what}.seed0.json").read_text())["entries"]
        for what in whats
    )
    shared = {entry for entry in first.keys() & second.keys() if entry.endswith("record")}
    assert shared
    for entry in shared:
        assert first[entry].get("average") == second[entry].get("average")
