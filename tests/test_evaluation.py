"""The reported likelihood is the model's, its error bars mean what they say, and the caller's state is untouched."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import random_model

from bd3lm_hf import NOISE_SCHEDULES
from bd3lm_hf.evaluation import Likelihood, evaluate_likelihood, unigram_perplexity


def random_sequences(num_sequences, length, vocab_size=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_sequences, length), generator=generator).tolist()


@torch.no_grad()
def cross_entropies(model, ids, masked):
    """-log p of the tokens at the positions `masked`, all masked together, given the text before their block."""
    mask_token_id = model.config.mask_token_id
    end = (max(masked) // model.config.block_size + 1) * model.config.block_size
    x_t = torch.tensor([ids[:end]])
    x_t[0, list(masked)] = mask_token_id
    logits = model(input_ids=x_t).logits[0].double()
    logits[:, mask_token_id] = -math.inf
    log_probs = logits.log_softmax(-1)
    return [-log_probs[position, ids[position]].item() for position in masked]


def autoregressive_nll(model, ids):
    """-log p of a text, token by token; the first is given."""
    return sum(cross_entropies(model, ids, [position])[0] for position in range(1, len(ids)))


def exact_nelbo(model, ids):
    """The bound of a text as the sum over all masks of each block: sum_k 1/k E_{|M|=k} sum_{i in M} CE_i(M)."""
    total = 0.0
    block_size = model.config.block_size
    for start in range(0, len(ids), block_size):
        positions = range(max(start, 1), min(start + block_size, len(ids)))
        for k in range(1, len(positions) + 1):
            subsets = list(itertools.combinations(positions, k))
            total += sum(sum(cross_entropies(model, ids, subset)) for subset in subsets) / (k * len(subsets))
    return total


@pytest.mark.parametrize("noise_schedule", list(NOISE_SCHEDULES))
def test_block_size_1_gives_the_autoregressive_likelihood(noise_schedule):
    model = random_model(block_size=1, noise_schedule=noise_schedule)
    sequences = random_sequences(3, 9)
    likelihood = evaluate_likelihood(model, sequences, batch_size=2, progress=False)
    expected = sum(autoregressive_nll(model, ids) for ids in sequences) / (3 * 8)
    assert likelihood.nelbo == pytest.approx(expected, abs=1e-5)
    assert likelihood.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert likelihood.draw_standard_error == 0
    assert (likelihood.num_tokens, likelihood.num_sequences, likelihood.num_draws) == (24, 3, 1)


def test_the_estimate_agrees_with_the_exact_bound_within_its_error():
    model = random_model(block_size=3)
    sequences = random_sequences(4, 6)
    expected = sum(exact_nelbo(model, ids) for ids in sequences) / (4 * 5)
    likelihood = evaluate_likelihood(model, sequences, batch_size=4, num_draws=1000, progress=False)
    assert likelihood.draw_standard_error < 0.02 * expected
    # 4 standard errors, and the share of the full interval that noise levels above 1e-3 leave out.
    assert likelihood.nelbo == pytest.approx(expected, abs=4 * likelihood.draw_standard_error + 1e-3 * expected)


def test_short_sequences_in_a_batch_count_as_they_would_alone():
    model = random_model(block_size=1)
    long, short = random_sequences(1, 11, seed=1)[0], random_sequences(1, 5, seed=2)[0]
    together = evaluate_likelihood(model, [long, short], batch_size=2, progress=False)
    alone = [evaluate_likelihood(model, [ids], progress=False) for ids in (long, short)]
    assert [part.num_tokens for part in alone] == [10, 4]
    assert together.num_tokens == 14
    assert together.nelbo == pytest.approx(sum(part.nelbo * part.num_tokens for part in alone) / 14, abs=1e-5)


def test_the_error_over_draws_is_the_spread_between_seeds():
    model = random_model(block_size=4)
    sequences = random_sequences(4, 8)
    runs = [
        evaluate_likelihood(model, sequences, batch_size=4, num_draws=4, seed=seed, progress=False)
        for seed in range(150)
    ]
    spread = np.std([run.nelbo for run in runs], ddof=1)
    reported = np.sqrt(np.mean([run.draw_standard_error**2 for run in runs]))
    # Both are known to about 7% from 150 runs; a forgotten square root of num_draws would be a factor of 2.
    assert reported == pytest.approx(spread, rel=0.3)


def test_the_error_over_sequences_is_the_spread_between_samples_of_text():
    model = random_model(block_size=1, vocab_size=8)
    # Lengths differ, as the last sequence of a corpus does: the estimator is a ratio.
    population = [ids[: 4 + index % 5] for index, ids in enumerate(random_sequences(1200, 8, vocab_size=7))]
    runs = [
        evaluate_likelihood(model, population[start : start + 12], batch_size=12, progress=False)
        for start in range(0, 1200, 12)
    ]
    spread = np.std([run.nelbo for run in runs], ddof=1)
    reported = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert reported == pytest.approx(spread, rel=0.3)


def test_a_seed_repeats_the_estimate_and_another_changes_it():
    model = random_model(block_size=4)
    sequences = random_sequences(4, 8)
    first, again, other = (
        evaluate_likelihood(model, sequences, num_draws=1, seed=seed, progress=False).nelbo for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("training", [True, False])
def test_random_state_and_mode_are_left_as_they_were(training):
    model = random_model(block_size=4).train(training)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate_likelihood(model, random_sequences(2, 8), num_draws=1, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training is training


def test_dropout_is_off_while_the_likelihood_is_taken():
    model = random_model(block_size=1, hidden_dropout=0.5)
    sequences = random_sequences(2, 8)
    without = evaluate_likelihood(model.eval(), sequences, progress=False)
    assert evaluate_likelihood(model.train(), sequences, progress=False) == without


def test_bits_per_byte_is_the_corpus_in_bits_over_its_bytes():
    likelihood = Likelihood(
        nelbo=math.log(8), standard_error=None, draw_standard_error=None, num_tokens=10, num_sequences=1,
        num_draws=1, num_bytes=40,
    )  # fmt: skip
    assert likelihood.perplexity == pytest.approx(8)
    assert likelihood.bits_per_byte == pytest.approx(10 * 3 / 40)


def test_json_holds_the_figures_and_names_what_is_unknown(tmp_path):
    model = random_model(block_size=1)
    likelihood = evaluate_likelihood(model, random_sequences(1, 8), progress=False)
    text = likelihood.to_json(tmp_path / "likelihood.json")
    read = json.loads((tmp_path / "likelihood.json").read_text())
    assert read == json.loads(text)
    assert read["perplexity"] == pytest.approx(math.exp(read["nelbo"]))
    assert read["num_tokens"] == 7
    assert read["standard_error"] is read["num_bytes"] is read["bits_per_byte"] is None


def test_what_cannot_be_evaluated_is_refused():
    model = random_model()
    with pytest.raises(ValueError, match=r"no token to predict \(0 sequences\)"):
        evaluate_likelihood(model, [])
    with pytest.raises(ValueError, match=r"no token to predict \(2 sequences\)"):
        evaluate_likelihood(model, [[1], [2]])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        evaluate_likelihood(model, [[1, 2]], batch_size=0)
    with pytest.raises(ValueError, match="num_draws=-1 must be at least 1"):
        evaluate_likelihood(model, [[1, 2]], num_draws=-1)


def test_unigram_perplexity_by_hand():
    # The first token of a row does not count. Training: 1, 1, 2 -> (1 + c) / (3 + 4) = 1/7, 3/7, 2/7, 1/7.
    train, held_out = [[0, 1, 1], [0, 2]], [[3, 1, 2], [3, 0]]
    expected = (3 / 7 * 2 / 7 * 1 / 7) ** (-1 / 3)
    assert unigram_perplexity(train, held_out, vocab_size=4) == pytest.approx(expected)


def test_unigram_perplexity_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="held_out_sequences holds no token to predict"):
        unigram_perplexity([[0, 1]], [[0]], vocab_size=4)
    with pytest.raises(ValueError, match="train_sequences holds ids from 4 to 4; it takes 0 to 3"):
        unigram_perplexity([[0, 4]], [[0, 1]], vocab_size=4)
