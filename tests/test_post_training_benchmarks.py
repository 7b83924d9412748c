"""The programs that measure what follows adaptation, on a tiny model."""

import json
from pathlib import Path

import pytest
from adapted import byte_tokenizer, causal_lm

from benchmarks.post_training import arms, few_steps, speculation


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
    first = (tmp_path / "post-half-and-half-0.json").read_text(encoding="utf-8")
    assert set(json.loads(first)) == {"nats", "written_nats"}
    assert arms.run([*few, "--seeds", "0", "1"]) == 0
    assert (tmp_path / "post-half-and-half-0.json").read_text(encoding="utf-8") == first
    table = capsys.readouterr().out
    assert "| half and half |" in table and "±" in table


def test_speculation_is_measured_beside_one_token_after_the_other(flags, tmp_path):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--num_texts", "2"]
    assert speculation.run(few) == 0
    results = json.loads((tmp_path / "speculation.json").read_text(encoding="utf-8"))
    assert results["same_texts"] and results["ways"]["one token after the other"]["tokens_per_forward"] == 1
    assert results["ways"]["self-speculation"]["tokens_per_forward"] >= 1


def test_fewer_steps_are_compared_from_one_start(flags, tmp_path, capsys):
    few = [*flags, "--output_dir", str(tmp_path), "--num_tokens", "1024", "--start_tokens", "1024", "--seeds", "0"]
    assert few_steps.run([*few, "--arms", "untrained", "likelihood", "path"]) == 0
    document = json.loads((tmp_path / "few_steps.json").read_text(encoding="utf-8"))
    scores = [document["runs"][name]["0"]["nats"] for name in ("untrained", "likelihood", "path")]
    assert len(set(scores)) == 3
    table = capsys.readouterr().out
    assert "| path |" in table and "path, at two tokens per forward:" in table


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
