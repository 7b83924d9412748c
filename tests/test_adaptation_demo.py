"""The demonstration of adaptation and the comparison of recipes, on a tiny model."""

import json
from pathlib import Path

import pytest
from adapted import byte_tokenizer, causal_lm

from benchmarks.adaptation import arms, costs, demo


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = byte_tokenizer()
    causal_lm(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = str(Path(__file__).parents[1] / "docs")
    return ["--source", str(folder), "--data", text, "--max_bytes", "40000", "--num_held_out", "2"]


def test_the_demonstration_converts_trains_scores_and_writes(flags, tmp_path):
    assert demo.run([*flags, "--output_dir", str(tmp_path), "--num_tokens", "3072"]) == 0
    results = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert abs(results["before"]["1"]["nats"] - results["source"]["nats"]) < 1e-4
    assert results["training"]["steps"] == 3 and set(results["texts"]) == {"1", "2", "4"}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"| {size} |" in report for size in demo.SCORED_SIZES)
    assert (tmp_path / "report.png").stat().st_size > 0 and (tmp_path / "model" / "config.json").is_file()


def test_the_comparison_goes_on_where_it_was(flags, tmp_path, capsys):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--arms", "baseline", "uniform weights"]
    assert arms.run([*few, "--seeds", "0"]) == 0
    first = (tmp_path / "arm-baseline-0.json").read_text(encoding="utf-8")
    assert arms.run([*few, "--seeds", "0", "1"]) == 0
    assert (tmp_path / "arm-baseline-0.json").read_text(encoding="utf-8") == first
    table = capsys.readouterr().out
    assert "| uniform weights |" in table and "±" in table


def test_speed_is_told_beside_its_bounds(flags, tmp_path, capsys):
    assert costs.run_speed([*flags, "--output_dir", str(tmp_path), "--rounds", "1"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[-1].rstrip(" |") for row in rows] == ["at most", "---", "1.15", "2.2"]
    assert all(float(ratio) > 0 for row in rows[2:] for ratio in row[2:4])


@pytest.mark.slow
def test_the_memory_of_qlora_is_that_of_a_process_of_its_own(flags, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    assert costs.run_qlora([*flags, "--output_dir", str(tmp_path), "--num_steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0].removeprefix("losses: ").split(", ")) == 2
    peak, libraries = (float(cell) for cell in lines[-1].strip("| ").split(" | ")[:2])
    assert 100 < libraries < peak < costs.MOST_MEMORY
