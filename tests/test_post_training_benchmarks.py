"""The programs that measure what follows adaptation, on a tiny model."""

import json
from pathlib import Path

import pytest
from adapted import byte_tokenizer, causal_lm

from benchmarks.post_training import arms, few_steps, speculation, writing


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = byte_tokenizer()
    causal_lm(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = str(Path(__file__).parents[1] / "docs")
    return ["--source", str(folder), "--data", text, "--max_bytes", "40000", "--num_held_out", "2"]


def test_the_arms_go_on_where_they_were(flags, tmp_path, capsys):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--arms", "likelihood", "half and half"]
    assert arms.run([*few, "--seeds", "0"]) == 0
    first = (tmp_path / "arm-half-and-half-0.json").read_text(encoding="utf-8")
    assert {"nats", "written", "tokens"} < set(json.loads(first))
    assert arms.run([*few, "--seeds", "0", "1"]) == 0
    assert (tmp_path / "arm-half-and-half-0.json").read_text(encoding="utf-8") == first
    assert not list(tmp_path.glob("*.unfinished"))
    table = capsys.readouterr().out
    assert "| half and half |" in table and "±" in table and "half and half, written texts, greedy:" in table
    assert len(json.loads((tmp_path / "arms.json").read_text(encoding="utf-8"))["runs"]["half and half"]) == 2


def test_speculation_is_measured_beside_the_autoregressive_model_of_the_same_weights(flags, tmp_path):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--num_texts", "2"]
    assert speculation.run(few) == 0
    results = json.loads((tmp_path / "speculation.json").read_text(encoding="utf-8"))
    for network in results["networks"].values():
        assert network["same_texts"] and network["num_same"] == [2, 2]
        ways = network["ways"]
        assert ways["the autoregressive model's generate"]["tokens_per_forward"] == 1
        assert ways["self-speculation"]["tokens_per_forward"] >= 1


def test_fewer_steps_are_compared_from_one_start(flags, tmp_path, capsys):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--start_tokens", "1024", "--seeds", "0"]
    assert few_steps.run([*few, "--arms", "untrained", "likelihood", "path", "own text"]) == 0
    document = json.loads((tmp_path / "few_steps.json").read_text(encoding="utf-8"))
    scores = [document["runs"][name]["0"]["nats"] for name in ("untrained", "likelihood", "path", "own text")]
    assert len(set(scores)) == 4
    table = capsys.readouterr().out
    assert "| path |" in table
    for base in ("untrained", "likelihood"):
        assert any(line.startswith("path, at") and line.endswith(f"below {base}.") for line in table.splitlines())


def test_differences_are_paired_by_seed_and_by_text():
    base = {"0": {"nats": 3.0, "by_text": [2.0, 4.0]}, "1": {"nats": 5.0, "by_text": [4.0, 6.0]}}
    arm = {"0": {"nats": 2.0, "by_text": [1.0, 3.0]}, "1": {"nats": 3.0, "by_text": [0.0, 6.0]}}
    # Over seeds 1 and 2 nats; over texts 2.5 and 0.5.
    assert writing.below(base, arm) == "1.500 ± 0.500 nats per token (over texts ± 1.000)"


def test_the_figures_of_rewards_and_preferences_are_those_of_the_runs():
    pytest.importorskip("trl")
    from benchmarks.adaptation.workbench import standard_error
    from benchmarks.post_training import arithmetic

    root = Path(__file__).parents[1]
    page = (root / "docs" / "post_training.md").read_text(encoding="utf-8")
    for kind, name in (("grpo", "right_held_out"), ("dpo", "margins")):
        path = root / "benchmarks" / "post_training" / "results" / f"arithmetic_{kind}.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        assert arithmetic.table(document) in page and len(document["runs"]) == 3
        gains = [result["after"][name] - result["before"][name] for result in document["runs"].values()]
        assert min(gains) > 0 and sum(gains) / 3 > 2 * standard_error(gains)
