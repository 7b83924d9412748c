"""Every experiment of benchmarks/paper runs, and docs/results.md is what its committed results make."""

import json

import pytest
import torch
from conftest import randomize

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from benchmarks.dense import two_stream_logits
from benchmarks.paper import report
from benchmarks.paper.experiment import RESULTS, is_positive, over_seeds, run
from benchmarks.paper.scales import SCALES
from benchmarks.paper.two_passes import two_pass_logits
from benchmarks.paper.workbench import AUTOREGRESSIVE, BASE, Arm, Workbench


COMMON_FIELDS = {"experiment", "scale", "settings", "data", "machine", "versions", "seeds", "seconds", "results"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"No. {number}:\n{'word ' * (number % 9)}end." for number in range(700)))
    return path


@pytest.fixture(scope="module")
def written(text_file, tmp_path_factory):
    """The folder of the results of all experiments, run at a minuscule size; they share their models."""
    folder, models = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("models")
    for name, module in report.EXPERIMENTS.items():
        argv = ["--scale", "tiny", "--data", str(text_file), "--output_dir", str(models), "--results", str(folder)]
        run(name, module.__doc__, module.measure, argv)
    return folder


@pytest.mark.parametrize("name", report.EXPERIMENTS)
def test_an_experiment_runs_and_is_shown(name, written, tmp_path):
    document = json.loads((written / f"{name}.tiny.json").read_text())
    assert set(document) == COMMON_FIELDS
    assert document["seeds"] == [0, 1] and document["seconds"] > 0
    assert "/" not in document["data"]
    section = report.page({name: document})
    assert f"benchmarks.paper.{name}" in section and "nan" not in section
    report.EXPERIMENTS[name].plot(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_page_is_what_the_committed_results_make():
    found, on_gpu = (report.documents(RESULTS, scale) for scale in ("cpu", "gpu"))
    assert report.PAGE.read_text(encoding="utf-8") == report.page(found, on_gpu)
    for name, document in found.items():
        assert len(document["seeds"]) >= 3
        assert report.PAGE.with_suffix("").joinpath(f"{name}.png").exists()
    for name in on_gpu:
        assert report.PAGE.with_suffix("").joinpath(f"{name}_gpu.png").exists()


def test_all_arms_of_a_seed_train_on_the_same_text_from_the_same_weights(text_file, tmp_path):
    bench = Workbench(SCALES["tiny"], str(text_file), tmp_path)
    base, whole, *continued = (
        bench._trainer(arm, seed=3) for arm in (BASE, AUTOREGRESSIVE, Arm(4), Arm(8, search=True))
    )

    def batches(trainer):
        return [batch["input_ids"] for batch in trainer.get_train_dataloader()]

    for trainer in continued:
        assert torch.equal(torch.stack(batches(base) + batches(trainer)), torch.stack(batches(whole)))
        expected = bench.trained(BASE, 3).state_dict()
        torch.testing.assert_close(trainer.model.state_dict(), expected, rtol=0, atol=0)
    assert [trainer.model.config.block_size for trainer in continued] == [4, 8]
    assert not torch.equal(batches(bench._trainer(BASE, seed=4))[0], batches(base)[0])


def test_what_was_measured_is_not_measured_again(text_file, tmp_path):
    bench = Workbench(SCALES["tiny"], str(text_file), tmp_path)
    first = bench.record(Arm(4), 0)
    again = Workbench(SCALES["tiny"], str(text_file), tmp_path)
    assert again.record(Arm(4), 0) == first
    assert again.used_seconds == first["seconds"]
    # With the base, when it was trained.
    assert bench.used_seconds == first["seconds"] + bench.record(BASE, 0)["seconds"]


def test_two_passes_and_one_give_the_same_logits():
    config = BD3LMConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        block_size=4,
        hidden_dropout=0.0,
        cond_dim=16,
    )
    model = randomize(BD3LMForMaskedLM(config).eval())
    x_t, x_0 = torch.randint(22, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(two_pass_logits(model, x_t, x_0), two_stream_logits(model, x_t, x_0))


@pytest.mark.parametrize(
    "values,expected", [([1.0, 1.1, 0.9], True), ([-1.0, -1.1, -0.9], False), ([1.0, -0.1, 1.0], None), ([1.0], None)]
)
def test_a_difference_counts_if_its_errors_tell(values, expected):
    assert is_positive(over_seeds(values)) is expected
