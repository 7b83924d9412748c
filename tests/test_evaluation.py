"""The reported likelihood is the model's, its error bars mean what they say, and the caller's state is untouched."""

import itertools
import json
import math
import multiprocessing
import os

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import DEVICE, random_model, tiny_config
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.evaluation.estimators import DrawnNoise, subset_noise
from bd3lm_hf.evaluation.likelihood import evaluate_likelihood, unigram_perplexity
from bd3lm_hf.modeling.diffusion_block_diffusion import NOISE_SCHEDULES
from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks


ESTIMATORS = ("exact", "stratified", "monte_carlo")


def random_sequences(num_sequences, length, vocab_size=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_sequences, length), generator=generator).tolist()


def random_walks(num_sequences, length, vocab_size=22, seed=0):
    """Texts that go up by 1 or by 2 from token to token, round and round: log 2 nats per token."""
    rng = np.random.default_rng(seed)
    starts, steps = rng.integers(vocab_size, size=(num_sequences, 1)), rng.integers(1, 3, (num_sequences, length))
    return ((starts + steps.cumsum(axis=1)) % vocab_size).tolist()


def evaluate(model, sequences, **options):
    return evaluate_likelihood(model, sequences, progress=False, **options)


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


def exact_nelbo(model, ids, predicted=None):
    """The bound of each token of a text over all masks of its block: 1/k E_{|M|=k} CE_i(M), summed over k."""
    predicted = range(1, len(ids)) if predicted is None else predicted
    nelbo = np.zeros(len(ids))
    block_size = model.config.block_size
    for start in range(0, len(ids), block_size):
        positions = [position for position in predicted if start <= position < start + block_size]
        for k in range(1, len(positions) + 1):
            subsets = list(itertools.combinations(positions, k))
            for subset in subsets:
                nelbo[list(subset)] += np.array(cross_entropies(model, ids, subset)) / (k * len(subsets))
    return nelbo


# the three estimators


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_exact_is_the_sum_over_all_masks(block_size):
    model = random_model(block_size=block_size).double()
    # The last blocks are short, one of them of a single token.
    sequences = [ids[:length] for ids, length in zip(random_sequences(3, 10), (10, 9, 6), strict=True)]
    expected = [exact_nelbo(model, ids) for ids in sequences]
    likelihood = evaluate(model, sequences, estimator="exact", batch_size=2)
    assert likelihood.num_tokens == 22
    # The model gives log-probabilities in float32.
    assert likelihood.nelbo == pytest.approx(sum(map(sum, expected)) / 22, rel=5e-7)
    assert likelihood.draw_standard_error == 0
    per_position = [np.mean([nelbo[j] for nelbo in expected if j < len(nelbo)]) for j in range(1, 10)]
    assert likelihood.nelbo_per_position[0] is None
    assert likelihood.nelbo_per_position[1:] == pytest.approx(per_position, rel=2e-6)
    assert likelihood.num_tokens_per_position == [0, *[3] * 5, *[2] * 3, 1]


@pytest.mark.parametrize("estimator", ["stratified", "monte_carlo"])
@pytest.mark.parametrize("block_size", [3, 8])
def test_drawn_estimates_agree_with_exact(estimator, block_size):
    model = random_model(block_size=block_size)
    sequences = [ids[:length] for ids, length in zip(random_sequences(4, 14), (14, 14, 13, 9), strict=True)]
    exact = evaluate(model, sequences, estimator="exact")
    drawn = evaluate(model, sequences, estimator=estimator, num_draws=80)
    assert drawn.draw_standard_error < (0.006 if estimator == "stratified" else 0.05) * exact.nelbo
    assert abs(drawn.nelbo - exact.nelbo) < 3 * drawn.draw_standard_error
    assert exact.num_draws == 0 and drawn.num_draws == 80


@pytest.mark.parametrize("noise_schedule", ["square", "log", "cosine"])
def test_under_any_schedule_the_bound_is_the_same(noise_schedule):
    sequences = random_sequences(2, 9)
    for options in ({"estimator": "exact"}, {"estimator": "stratified", "num_draws": 3}):
        model = random_model(noise_schedule=noise_schedule)
        assert evaluate(model, sequences, **options) == evaluate(random_model(), sequences, **options)
        assert model.config.noise_schedule == noise_schedule


def test_stratified_masks_weigh_as_the_sum_over_their_number_has_it():
    config = tiny_config(block_size=8)
    ids = torch.tensor(random_sequences(6, 20))
    blocks = TextBlocks.of_batch(config, ids, ids)
    (noise,) = DrawnNoise(config, "stratified", seed=0).of_batch(ids, blocks, range(6), draw=0)
    masked, weights = ((noise.x_t == config.mask_token_id).view(6, 4, 20), noise.loss_weights.view(6, 4, 20))
    counts = set()
    for start, end in ((1, 8), (8, 16), (16, 20)):
        size, number = end - start, masked[:, :, start:end].sum(-1)
        counts |= set(number.flatten().tolist())
        # 1 / k over the probability 1 / m of drawing k, and over the four copies of the draw.
        expected = (size / number / 4)[:, :, None].expand(-1, -1, size)
        torch.testing.assert_close(weights[:, :, start:end], expected, rtol=1e-5, atol=0)
        # The copies share out the numbers, so that none leaves out the smaller or the larger half of them.
        assert ((number <= size / 2).any(1) & (number >= size / 2).any(1)).all()
    assert counts == set(range(1, 9))


@pytest.mark.parametrize("block_size", [4, 16])
def test_stratified_has_at_most_half_the_variance_at_equal_forwards(block_size):
    torch.manual_seed(0)
    config = tiny_config(block_size=block_size, initializer_range=0.2, tie_word_embeddings=True)
    model = BD3LMForMaskedLM(config).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        ids = torch.tensor(random_walks(8, 32, seed=1000 + step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sequences = random_walks(64, 32, seed=1)
    stratified, monte_carlo = (
        evaluate(model, sequences, estimator=estimator, num_draws=6, batch_size=64) for estimator in ESTIMATORS[1:]
    )
    # It has learnt much of what there is to know.
    assert stratified.nelbo < 0.65 * math.log(22)
    assert stratified.draw_standard_error**2 < 0.5 * monte_carlo.draw_standard_error**2
    error = math.hypot(stratified.draw_standard_error, monte_carlo.draw_standard_error)
    assert abs(stratified.nelbo - monte_carlo.nelbo) < 3 * error


@pytest.mark.parametrize("noise_schedule", list(NOISE_SCHEDULES))
def test_block_size_1_gives_the_autoregressive_likelihood(noise_schedule):
    model = random_model(block_size=1, noise_schedule=noise_schedule)
    sequences = random_sequences(3, 9)
    likelihood = evaluate(model, sequences, batch_size=2)
    assert (likelihood.estimator, likelihood.num_draws, likelihood.draw_standard_error) == ("exact", 0, 0)
    expected = sum(cross_entropies(model, ids, [j])[0] for ids in sequences for j in range(1, 9)) / 24
    assert likelihood.nelbo == pytest.approx(expected, abs=1e-5)
    assert likelihood.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    stratified = evaluate(model, sequences, estimator="stratified")
    assert stratified.nelbo == pytest.approx(expected, abs=1e-5)
    assert stratified.draw_standard_error < 1e-6


def test_a_model_that_reads_t_has_its_t_drawn():
    model = random_model(block_size=2, time_conditioning=True)
    sequences = random_sequences(8, 9)
    first, second = (
        evaluate(model, sequences, estimator=estimator, num_draws=40) for estimator in (None, "monte_carlo")
    )
    assert first.estimator == "stratified"
    error = math.hypot(first.draw_standard_error, second.draw_standard_error)
    assert abs(first.nelbo - second.nelbo) < 3 * error < 0.1 * second.nelbo
    with pytest.raises(ValueError, match="`estimator` must be 'stratified' or 'monte_carlo' .* but got 'exact'"):
        evaluate(model, sequences, estimator="exact")


def test_subsets_are_numbered_by_their_predicted_tokens():
    config = tiny_config(block_size=4)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([[1, 2, -100, 4, 5, 6]])
    noise = subset_noise(config, ids, TextBlocks.of_batch(config, ids, labels), range(1, 8))
    masked = (noise.x_t == config.mask_token_id).view(7, 6)
    # Columns 1 and 3 are predicted in the first block, 4 and 5 in the second: each has three masks.
    columns = [mask.nonzero().flatten().tolist() for mask in masked]
    assert columns == [[1, 4], [3, 5], [1, 3, 4, 5], [], [], [], []]
    weights = noise.loss_weights.view(7, 6)[masked]
    assert weights.tolist() == [1 / 2] * 8


def test_what_is_labelled_minus_100_is_read_and_not_predicted():
    model = random_model(block_size=4)
    ids, predicted = random_sequences(1, 11)[0], [3, 5, 6, 10]
    labels = [token if position in predicted else -100 for position, token in enumerate(ids)]
    likelihood = evaluate(model, [ids], labels=[labels])
    assert likelihood.num_tokens == 4
    assert likelihood.nelbo == pytest.approx(exact_nelbo(model, ids, predicted).sum() / 4, rel=1e-5)


def test_without_ignore_bos_the_first_token_is_predicted():
    model = random_model(block_size=2, ignore_bos=False)
    (ids,) = random_sequences(1, 5)
    likelihood = evaluate(model, [ids])
    assert likelihood.nelbo == pytest.approx(exact_nelbo(model, ids, range(5)).sum() / 5, rel=1e-5)


# standard errors and their targets


def test_the_error_over_draws_is_the_spread_between_seeds():
    model = random_model(block_size=4)
    sequences = random_sequences(3, 9)
    for estimator in ESTIMATORS[1:]:
        runs = [evaluate(model, sequences, estimator=estimator, num_draws=3, seed=seed) for seed in range(50)]
        spread = np.std([run.nelbo for run in runs], ddof=1)
        reported = np.sqrt(np.mean([run.draw_standard_error**2 for run in runs]))
        # Both are known to about 10% from 50 runs; a forgotten square root of num_draws would be a factor of 1.7.
        assert reported == pytest.approx(spread, rel=0.3)


def test_the_error_over_sequences_is_the_spread_between_samples_of_text():
    model = random_model(block_size=1, vocab_size=8)
    # Lengths differ, as the last sequence of a corpus does: the estimator is a ratio.
    population = [ids[: 4 + index % 5] for index, ids in enumerate(random_sequences(1200, 8, vocab_size=7))]
    runs = [evaluate(model, population[start : start + 12], batch_size=12) for start in range(0, 1200, 12)]
    spread = np.std([run.nelbo for run in runs], ddof=1)
    reported = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert reported == pytest.approx(spread, rel=0.3)


def test_drawing_ends_when_the_target_error_is_reached():
    model, sequences = random_model(block_size=8), random_sequences(8, 32)
    first = evaluate(model, sequences, num_draws=2)
    target = first.draw_standard_error / 3
    likelihood = evaluate(model, sequences, target_error=target)
    assert likelihood.target_reached and likelihood.draw_standard_error <= target
    # The error falls with the square root of the draws.
    assert 9 < likelihood.num_draws < 40
    before = evaluate(model, sequences, num_draws=likelihood.num_draws - 1)
    assert before.draw_standard_error > target and before.target_reached is None
    assert evaluate(model, sequences, target_error=first.draw_standard_error * 1.001).num_draws == 2
    assert evaluate(model, sequences, num_draws=likelihood.num_draws).nelbo == likelihood.nelbo


def test_one_short_text_does_not_end_drawing_by_a_lucky_pair():
    model, sequences = random_model(block_size=8), random_sequences(1, 9)
    assert evaluate(model, sequences, target_error=100.0).num_draws == 9


def test_a_target_that_was_not_reached_is_marked():
    model, sequences = random_model(block_size=8), random_sequences(2, 16)
    likelihood = evaluate(model, sequences, target_error=1e-9, max_draws=3)
    assert (likelihood.target_reached, likelihood.num_draws) == (False, 3)
    assert "NOT within the target error of 1e-09" in str(likelihood)
    assert json.loads(likelihood.to_json())["target_reached"] is False
    exact = evaluate(model, sequences, estimator="exact", target_error=1e-9)
    assert exact.target_reached is True and "NOT" not in str(exact)


def test_a_seed_repeats_the_estimate_and_another_changes_it():
    model, sequences = random_model(block_size=8), random_sequences(4, 8)
    first, again, other = (evaluate(model, sequences, num_draws=1, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.nelbo != other.nelbo and first.seed == 3
    assert first.draw_standard_error is None


# however it is computed


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batch_size_padding_and_attention_change_nothing(estimator, uncompiled_flex_attention):
    sequences = [ids[:length] for ids, length in zip(random_sequences(7, 21), (21, 20, 6, 21, 9, 3, 17), strict=True)]
    options = {"estimator": estimator, "num_draws": 2}
    first = evaluate(random_model(), sequences, batch_size=1, **options)
    for implementation, batch_size in (("eager", 3), ("sdpa", 7), ("flex_attention", 4)):
        model = random_model(attn_implementation=implementation)
        other = evaluate(model, sequences, batch_size=batch_size, **options)
        assert other.perplexity == pytest.approx(first.perplexity, rel=1e-5)
        assert other.standard_error == pytest.approx(first.standard_error, rel=1e-4)
        assert other.nelbo_per_position[1:] == pytest.approx(first.nelbo_per_position[1:], rel=1e-4)


def test_the_order_of_documents_changes_nothing():
    model = random_model()
    sequences = [ids[: 5 + number] for number, ids in enumerate(random_sequences(9, 40))]
    first = evaluate(model, sequences, window=16, stride=8, batch_size=2)
    other = evaluate(model, sequences[::-1], window=16, stride=8, batch_size=2)
    assert other.perplexity == pytest.approx(first.perplexity, rel=1e-6)
    assert other.standard_error == pytest.approx(first.standard_error, rel=1e-5)


def _evaluate_as(rank, port, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    # The store is there already.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    PartialState._reset_state()
    assert PartialState(cpu=True).num_processes == 2
    results.put((rank, [run.to_dict() for run in _runs_of_one_corpus()]))
    # Nobody leaves while the other may wait for him.
    PartialState().wait_for_everyone()


def _runs_of_one_corpus():
    model = random_model(block_size=4)
    # Five windows, so that the processes have shares of different sizes.
    sequences = [ids[:length] for ids, length in zip(random_sequences(3, 30), (30, 13, 5), strict=True)]
    options = {"window": 16, "stride": 8, "batch_size": 1}
    yield evaluate(model, sequences, **options)
    yield evaluate(model, sequences, estimator="stratified", target_error=0.02, **options)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="two processes on a GPU need two of them")
def test_two_processes_return_what_one_does():
    # Here, at a port that is never free for others in between.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Not forked: a child of a process with threads of OpenMP waits forever for those that it does not have.
    context = multiprocessing.get_context("spawn")
    port, results = str(store.port), context.Queue()
    processes = [context.Process(target=_evaluate_as, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for number, expected in enumerate(_runs_of_one_corpus()):
        for rank in range(2):
            for name, value in expected.to_dict().items():
                # Nothing is predicted at the first position.
                got, value = (
                    part[1:] if isinstance(part, list) else part for part in (found[rank][number][name], value)
                )
                assert got == value or got == pytest.approx(value, rel=1e-6), name
    assert expected.target_reached and expected.num_draws > 2


@pytest.mark.parametrize("training", [True, False])
def test_random_state_and_mode_are_left_as_they_were(training):
    model = random_model(block_size=8).train(training)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(model, random_sequences(2, 8), num_draws=1)
    assert torch.equal(torch.rand(3), expected)
    assert model.training is training


def test_dropout_is_off_while_the_likelihood_is_taken():
    model = random_model(block_size=1, hidden_dropout=0.5)
    sequences = random_sequences(2, 8)
    without = evaluate(model.eval(), sequences)
    assert evaluate(model.train(), sequences) == without


# documents longer than the context


@pytest.mark.parametrize("stride", [None, 4, 12])
def test_a_long_document_is_read_through_a_sliding_window(stride):
    model = random_model(block_size=4, max_position_embeddings=16)
    (ids,) = random_sequences(1, 43)
    likelihood = evaluate(model, [ids], stride=stride)
    assert (likelihood.window, likelihood.stride) == (16, stride or 8)
    stride, expected = likelihood.stride, np.zeros(43)
    for start in range(0, 43, 4):
        # The first window that holds this block, alone with what it has before it.
        first = stride * max(0, -(-(start + 4 - 16) // stride))
        part = ids[first : start + 4]
        expected[start : start + 4] = exact_nelbo(model, part, range(max(start - first, first == 0), len(part)))[
            start - first :
        ]
    assert likelihood.num_tokens_per_position == [0] + [1] * 42
    assert likelihood.nelbo_per_position[1:] == pytest.approx(expected[1:], rel=1e-4)
    assert likelihood.nelbo == pytest.approx(expected.sum() / 42, rel=1e-5)


def test_a_window_of_one_block_slides_by_all_but_one_token():
    model = random_model(block_size=8, max_position_embeddings=8)
    (ids,) = random_sequences(1, 20)
    likelihood = evaluate(model, [ids], estimator="exact")
    assert (likelihood.stride, likelihood.num_tokens) == (7, 19)
    parts = [exact_nelbo(model, ids[start : start + 8])[1:] for start in (0, 7, 14)]
    assert likelihood.nelbo_per_position[1:] == pytest.approx(np.concatenate(parts), rel=1e-4)


def test_windows_of_a_document_are_one_sequence_to_the_standard_error():
    model = random_model(block_size=4, max_position_embeddings=16)
    first, second = random_sequences(2, 40)
    likelihood = evaluate(model, [first, second])
    parts = [evaluate(model, [ids]).nelbo for ids in (first, second)]
    assert likelihood.num_sequences == 2
    assert likelihood.standard_error == pytest.approx(np.std(parts, ddof=1) / math.sqrt(2), rel=1e-4)


# autoregressive models


def gpt2(**overrides):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    config.update(overrides)
    return GPT2LMHeadModel(config).to(DEVICE).eval()


@torch.no_grad()
def test_gpt2_evaluates_to_the_loss_of_transformers():
    model = gpt2()
    sequences = [ids[:length] for ids, length in zip(random_sequences(5, 30), (30, 4, 17, 30, 2), strict=True)]
    likelihood = evaluate(model, sequences, batch_size=2)
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in sequences]
    tokens = [len(ids) - 1 for ids in sequences]
    assert likelihood.nelbo == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    assert likelihood.num_tokens == sum(tokens)
    assert (likelihood.estimator, likelihood.block_size, likelihood.draw_standard_error) == ("exact", 1, 0)
    # A long document as the guide to perplexity in Transformers' documentation scores it.
    (ids,) = random_sequences(1, 75, seed=1)
    long = evaluate(model, [ids], stride=10)
    total = 0.0
    for start, first in ((0, 1), (10, 32), (20, 42), (30, 52), (40, 62), (50, 72)):
        part = torch.tensor([ids[start : start + 32]])
        labels = part.clone()
        labels[:, : first - start] = -100
        total += model(part, labels=labels).loss.item() * int((labels != -100).sum())
    assert long.num_tokens == 74
    assert long.nelbo == pytest.approx(total / 74, rel=1e-6)


def test_gpt2_and_a_block_model_are_scored_on_the_same_tokens():
    (ids,) = random_sequences(1, 50)
    labels = [-100] * 9 + ids[9:]
    options = {"labels": [labels], "window": 16, "stride": 8, "num_bytes": 99}
    first, other = (evaluate(model, [ids], **options) for model in (gpt2(), random_model()))
    for name in ("num_tokens", "num_bytes", "window", "stride", "num_tokens_per_position", "estimator"):
        assert getattr(first, name) == getattr(other, name), name
    assert first.to_dict().keys() == other.to_dict().keys()


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertLMHeadModel])
def test_a_model_that_reads_what_it_predicts_is_refused(model_class):
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16)
    with pytest.raises(ValueError, match=f"`model` must be a BD3LMForMaskedLM or an .* {model_class.__name__}, whose"):
        evaluate(model_class(config), [[1, 2]])
    config.is_decoder = True
    assert evaluate(BertLMHeadModel(config), [[1, 2]]).num_tokens == 1


def test_an_autoregressive_model_has_but_one_estimator():
    with pytest.raises(ValueError, match="`estimator` must be 'exact' for an autoregressive model, .* 'stratified'"):
        evaluate(gpt2(), [[1, 2]], estimator="stratified")


# results and errors


def test_bits_per_byte_is_the_corpus_in_bits_over_its_bytes():
    likelihood = evaluate(random_model(), random_sequences(2, 11), num_bytes=40)
    likelihood.nelbo = math.log(8)
    assert likelihood.perplexity == pytest.approx(8)
    assert likelihood.bits_per_byte == pytest.approx(20 * 3 / 40)
    assert "perplexity 8.00, 1.500 bits per byte, 2.0794 ± " in str(likelihood)


def test_json_holds_the_figures_and_names_what_is_unknown(tmp_path):
    likelihood = evaluate(random_model(block_size=8), random_sequences(1, 8), num_draws=1, seed=3)
    text = likelihood.to_json(tmp_path / "likelihood.json")
    read = json.loads((tmp_path / "likelihood.json").read_text())
    assert read == json.loads(text) == likelihood.to_dict()
    assert read["perplexity"] == pytest.approx(math.exp(read["nelbo"]))
    assert (read["num_tokens"], read["estimator"], read["num_draws"], read["seed"]) == (7, "stratified", 1, 3)
    unknown = ("standard_error", "draw_standard_error", "num_bytes", "bits_per_byte", "target_reached")
    assert all(read[name] is None for name in unknown)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([], {}, "`sequences` must hold a token to predict, but got 0 sequences of at most 0 tokens"),
        ([[1], []], {}, "but got 2 sequences of at most 1 tokens, the first of which is only read"),
        ([[1, 2]], {"labels": [[1, -100]]}, "must hold a token to predict, but got 1 sequences of at most 2 tokens"),
        ([[1, 2]], {"labels": [[1, 2, 3]]}, "`labels` of sequence 0 must be as long as it, 2, but got 3"),
        ([[1, 2]], {"labels": []}, "`labels` must be as many as `sequences`, 1, but got 0"),
        ([[1, 2], [3, 23]], {}, "`sequences` must hold ids from 0 to 22, but got 3 to 23 in sequence 1"),
        ([[1, 2]], {"labels": [[1, -1]]}, "`labels` must hold ids from 0 to 22, but got -1 to 1 in sequence 0"),
        ([[1, 22]], {}, r"`labels` must not hold the mask token \(22\)"),
        ([[1, 2]], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ([[1, 2]], {"num_draws": -1}, "num_draws=-1 must be at least 1"),
        ([[1, 2]], {"estimator": "best"}, "`estimator` must be one of exact, stratified, monte_carlo, but got 'best'"),
        ([[1] * 14], {"estimator": "exact"}, "'exact' enumerates .* up to k = 12, but got a block with k = 13"),
        ([[1, 2]], {"target_error": 0.0}, "`target_error` must be positive, .* but got 0.0, 64 and 2"),
        ([[1, 2]], {"target_error": 0.1, "max_draws": 1, "num_draws": 1}, "`max_draws` at least .* 0.1, 1 and 1"),
        (
            [[1, 2]],
            {"window": 24},
            r"`window` must be at least 2 .* at most 64, .* \(`block_size` 16\), .* 24",
        ),
        ([[1, 2]], {"window": 80}, "and at most 64, the model's context, in whole blocks .* but got 80"),
        ([[1, 2]], {"stride": 64}, r"`stride` must be at least 1 and less than `window` \(64\), .* but got 64"),
        ([[1, 2]], {"stride": 8}, r"in whole blocks \(`block_size` 16\) where the window holds several, but got 8"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(sequences, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(random_model(block_size=16), sequences, **options)


def test_a_text_of_a_single_token_counts_for_nothing_beside_others():
    model, sequences = random_model(), random_sequences(2, 8)
    assert evaluate(model, [[5], *sequences, []]) == evaluate(model, sequences)


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
