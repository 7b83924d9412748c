"""`benchmarks.quality` from end to end at a tiny size, its infilling likelihood by brute force, and its tables."""

import json
import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model

from bd3lm_hf import load_documents, train_tokenizer
from bd3lm_hf.evaluation.likelihood import evaluate_likelihood
from benchmarks import quality
from benchmarks.infilling import (
    MOST_TOKENS,
    Gap,
    any_order_bound,
    any_order_nll,
    autoregressive_nll,
    draw_gap,
    fill,
    left_to_right_nll,
    per_token,
    reveal_log_probs,
    score_gap,
)
from benchmarks.quality_report import NO_SAMPLER, insert_tables, table, tables


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PAGE = ROOT / "docs" / "generation.md"
# Vocabulary of the enumerations, the mask token included.
VOCAB_SIZE = 5


@pytest.fixture(scope="module")
def model():
    """One that is sure of itself, so that it matters what is known."""
    model = random_model(vocab_size=VOCAB_SIZE, block_size=4, max_position_embeddings=16)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([0, 3, 1, 2, 2, 0, 1, 3, 3, 2, 0, 1])


@torch.no_grad()
def nll_in_order(model, ids, order, hidden=()):
    """-log p of revealing tokens in this order, by passes over the whole text; `hidden` ones stay masked."""
    mask_token_id = model.config.mask_token_id
    x_t = ids.clone()
    x_t[[*order, *hidden]] = mask_token_id
    total = 0.0
    for position in order:
        logits = model(x_t[None]).logits[0, position].double()
        logits[mask_token_id] = -torch.inf
        total -= logits.log_softmax(-1)[ids[position]].item()
        x_t[position] = ids[position]
    return total


# The likelihood of a gap

GAPS = [Gap(5, 7), Gap(4, 7), Gap(4, 8), Gap(1, 2), Gap(8, 11)]


@pytest.mark.parametrize("sees_right", [True, False])
@pytest.mark.parametrize("gap", GAPS, ids=str)
def test_a_gap_in_one_block_is_scored_as_by_brute_force_over_all_orders(model, ids, gap, sees_right):
    block_end = (gap.start // 4 + 1) * 4
    hidden = [] if sees_right else list(range(gap.stop, block_end))
    of_orders = [nll_in_order(model, ids, order, hidden) for order in permutations(range(gap.start, gap.stop))]
    log_probs = reveal_log_probs(model, ids, gap, sees_right)
    assert any_order_bound(log_probs) == pytest.approx(np.mean(of_orders), abs=1e-4)
    assert any_order_nll(log_probs) == pytest.approx(-math.log(np.mean(np.exp(-np.array(of_orders)))), abs=1e-4)
    # `permutations` begins with the order of the text.
    assert left_to_right_nll(log_probs) == pytest.approx(of_orders[0], abs=1e-4)
    if gap.num_tokens > 1:
        assert np.std(of_orders) > 0.01, "the order must matter for this to be a test"


def test_a_gap_through_blocks_is_the_sum_over_them_behind_the_words_that_were_removed(model, ids):
    scores = score_gap(model, ids, Gap(6, 10))
    parts = [
        np.mean([nll_in_order(model, ids[:stop], order) for order in permutations(positions)])
        for positions, stop in (((6, 7), 8), ((8, 9), 12))
    ]
    assert scores["infill_bound"] == pytest.approx(sum(parts), abs=1e-4)
    left_to_right = nll_in_order(model, ids[:8], (6, 7)) + nll_in_order(model, ids, (8, 9), (10, 11))
    assert scores["continue_left_to_right"] == pytest.approx(left_to_right, abs=1e-4)


def test_a_whole_block_has_the_nelbo_that_evaluation_gives_it(model, ids):
    first, second, third = (score_gap(model, ids, gap)["infill_bound"] for gap in (Gap(1, 4), Gap(4, 8), Gap(8, 12)))
    likelihood = evaluate_likelihood(model, [ids.tolist()], estimator="exact", progress=False)
    assert first + second + third == pytest.approx(likelihood.nelbo * likelihood.num_tokens, rel=1e-4)


@pytest.mark.parametrize("sees_right", [True, False])
def test_the_likelihoods_of_all_fillings_add_up_to_one(model, ids, sees_right):
    total = 0.0
    for filling in product(range(VOCAB_SIZE - 1), repeat=2):
        text = ids.clone()
        text[5:7] = torch.tensor(filling)
        total += math.exp(-any_order_nll(reveal_log_probs(model, text, Gap(5, 7), sees_right)))
    assert total == pytest.approx(1, abs=1e-4)


def test_generate_fills_a_gap_as_often_with_each_filling_as_its_likelihood_says(model, ids):
    num_texts, gap = 4096, Gap(5, 7)
    text = ids.clone()
    text[gap.start : gap.stop] = model.config.mask_token_id
    model.generation_config.eos_token_id = None
    filled = model.generate(text.repeat(num_texts, 1), infill=True, seed=3)[:, gap.start : gap.stop]
    counts = torch.zeros(VOCAB_SIZE - 1, VOCAB_SIZE - 1)
    counts.index_put_(tuple(filled.T), torch.ones(num_texts), accumulate=True)
    chi_square = 0.0
    for filling in product(range(VOCAB_SIZE - 1), repeat=2):
        text[gap.start : gap.stop] = torch.tensor(filling)
        expected = num_texts * math.exp(-any_order_nll(reveal_log_probs(model, text, gap, True)))
        chi_square += (counts[filling].item() - expected) ** 2 / expected
    # 15 degrees of freedom: 44.3 is exceeded once in ten thousand times.
    assert chi_square < 44.3


def test_only_infilling_reads_the_tokens_behind_a_gap_and_only_those_of_its_block(model, ids):
    before = score_gap(model, ids, Gap(4, 6))
    in_block, behind = ids.clone(), ids.clone()
    in_block[7], behind[8] = (ids[7] + 1) % 4, (ids[8] + 1) % 4
    assert score_gap(model, behind, Gap(4, 6)) == before
    after = score_gap(model, in_block, Gap(4, 6))
    assert after["continue"] == before["continue"]
    assert abs(after["infill"] - before["infill"]) > 1e-3


def test_filling_keeps_what_is_given_and_says_so_if_not(model, ids, monkeypatch):
    sequences, gaps = ids.repeat(3, 1), [Gap(1, 3), Gap(5, 9), Gap(11, 12)]
    restored = fill(model, sequences, gaps, sees_right=True)
    assert restored.shape == (3,)
    assert all(0 <= number <= gap.num_tokens for number, gap in zip(restored, gaps, strict=True))
    monkeypatch.setattr(model, "generate", lambda input_ids, **arguments: input_ids)
    with pytest.raises(AssertionError, match="not filled"):
        fill(model, sequences, gaps, sees_right=True)
    monkeypatch.setattr(model, "generate", lambda input_ids, **arguments: torch.zeros_like(input_ids))
    with pytest.raises(AssertionError, match="not kept"):
        fill(model, sequences, gaps, sees_right=True)


def test_the_error_of_nats_per_token_is_that_of_a_ratio():
    generator = np.random.default_rng(0)

    def draw(number):
        tokens = generator.integers(1, 9, number)
        return 2.0 * tokens + generator.normal(0, 1, number), tokens

    means = [per_token(*draw(50)) for _ in range(2000)]
    spread = np.std([estimate.value for estimate in means])
    assert np.mean([estimate.standard_error for estimate in means]) == pytest.approx(spread, rel=0.08)


# From end to end


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of text that the tiny models are trained on."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory, corpus):
    """The flags of a tiny run, and its folder."""
    folder = tmp_path_factory.mktemp("quality")
    flags = {
        "output_dir": folder,
        "data": corpus,
        "vocab_size": 300,
        "length": 16,
        "block_size": 4,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_steps": 3,
        "num_autoregressive_steps": 1,
        "num_judge_steps": 4,
        "num_held_out": 12,
        "num_seeds": 2,
        "num_samples": 3,
        "repeats": 1,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))], folder


@pytest.fixture(scope="module")
def results(command):
    flags, folder = command
    quality.main(flags)
    return json.loads((folder / "quality.json").read_text())


def test_each_setting_has_its_figures_with_errors(results):
    rows = results["sampling"]["rows"]
    assert set(rows) == {*NO_SAMPLER, *quality.sampler_settings(4)}
    for name, row in rows.items():
        assert row["generative_perplexity"]["value"] > 1
        assert 0 <= row["entropy"]["value"] <= math.log(15)
        assert all(row[key]["standard_error"] >= 0 for key in ("generative_perplexity", "entropy"))
        assert name == "held-out text" or 0 < row["forwards_per_token"]["value"] <= 2
    forwards = {name: row["forwards_per_token"]["value"] for name, row in rows.items() if name != "held-out text"}
    assert forwards["GPT-2"] == forwards["first_hitting"] == forwards["confidence, denoising_steps=4"] == 1
    assert forwards["ancestral, denoising_steps=1"] == pytest.approx(4 / 15)
    assert forwards["confidence, denoising_steps=2"] == pytest.approx(8 / 15)


def test_the_settings_that_take_few_forwards_are_timed(results):
    timed = results["speed"]["tokens_per_second"]
    assert {"GPT-2", "first_hitting", "confidence, denoising_steps=1"} <= set(timed)
    assert "ancestral, denoising_steps=1" not in timed
    assert all(speed["batch_1"] > 0 and speed["batch_8"] > 0 for speed in timed.values())


def test_gaps_of_held_out_text_are_scored(results):
    row = results["infilling"]["rows"]["all"]
    assert 2 <= row["num_gaps"] <= 12
    difference = row["continue"]["value"] - row["infill"]["value"]
    assert row["continue_less_infill"]["value"] == pytest.approx(difference)
    assert row["infill"]["value"] <= row["infill_bound"]["value"]
    assert 0 <= row["restored_by_infill"]["value"] <= 1


def test_the_likelihood_of_each_model_is_kept_with_the_recipe(results):
    assert results["recipe"]["block_size"] == 4
    assert all(results["likelihood"][name]["value"] > 0 for name in ("bd3lm", "gpt2", "judge"))


def test_a_second_run_trains_nothing_and_makes_the_same_figures(command, results):
    flags, folder = command
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    quality.main(["infilling", "sampling", *flags])
    again = json.loads((folder / "quality.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == weights
    assert again == results


def test_models_of_another_recipe_are_refused(command, results):
    with pytest.raises(ValueError, match="another recipe"):
        quality.main(["train", *command[0], "--hidden_size", "64"])


def test_an_unknown_part_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        quality.main(["samplng", *command[0]])
    assert "samplng" in capsys.readouterr().err


# The report


def test_tables_replace_those_with_the_same_header_and_nothing_else(tmp_path, results, capsys):
    page = tmp_path / "page.md"
    old = [new.split("\n")[0] + "\n| --- |\n| old |" for new in tables(results)]
    page.write_text("before\n\n" + "\n\nbetween\n\n".join(old) + "\n\nafter\n")
    insert_tables(results, page)
    assert page.read_text() == "before\n\n" + "\n\nbetween\n\n".join(tables(results)) + "\n\nafter\n"
    assert all(new in capsys.readouterr().out for new in tables(results)[:1])


def test_a_page_without_the_table_is_refused(tmp_path, results):
    page = tmp_path / "page.md"
    page.write_text(table(["another"], []))
    with pytest.raises(ValueError, match="with the header"):
        insert_tables(results, page)


def test_the_tables_of_the_page_are_those_of_the_committed_figures():
    text = PAGE.read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text())
    made = tables(results)
    assert len(made) == 5 and results["speed"]["machine"] in text
    assert [new for new in made if new not in text] == []


def test_the_committed_figures_are_those_of_the_committed_recipe():
    results = json.loads(RESULTS.read_text())
    settings = quality.sampler_settings(results["recipe"]["block_size"])
    assert {
        name: row["arguments"] for name, row in results["sampling"]["rows"].items() if name in settings
    } == settings
    assert results["sampling"]["num_seeds"] >= 3


# The gaps


def test_gaps_are_whole_words_of_few_tokens(corpus):
    tokenizer = train_tokenizer(load_documents(str(corpus)), 400)
    ids = [0, *tokenizer(corpus.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:400], 1]
    generator = np.random.default_rng(0)
    lengths = set()
    for _ in range(200):
        gap = draw_gap(ids, tokenizer, generator)
        words = tokenizer.decode(ids[gap.start : gap.stop])
        assert words[0] in " \n" and any(character.isalnum() for character in words)
        assert tokenizer.decode(ids[gap.stop]) in tokenizer.all_special_tokens or (
            tokenizer.decode(ids[gap.stop])[0] in " \n"
        )
        lengths.add(gap.num_tokens)
    assert max(lengths) <= MOST_TOKENS and len(lengths) > 4
    assert draw_gap([0, 1], tokenizer, generator) is None


def test_gaps_are_cut_at_the_borders_of_blocks():
    assert Gap(3, 9).in_blocks(4) == [Gap(3, 4), Gap(4, 8), Gap(8, 9)]
    assert Gap(4, 8).in_blocks(4) == [Gap(4, 8)]
    assert Gap(5, 6).in_blocks(4) == [Gap(5, 6)]


def test_an_autoregressive_model_is_scored_behind_what_stands_before_a_gap(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    ).eval()
    expected = 0.0
    for position in (5, 6, 7):
        logits = gpt2(ids[None, :position]).logits[0, -1]
        expected -= logits.log_softmax(-1)[ids[position]].item()
    assert autoregressive_nll(gpt2, ids, Gap(5, 8)) == pytest.approx(expected, abs=1e-5)
