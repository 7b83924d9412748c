"""Samples are judged as the definitions say, one token after the other, in whatever batches."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import random_model
from datasets import Dataset
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from bd3lm_hf import generative_perplexity, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.evaluation.quality import distinct, repetition, sample_statistics, token_entropy


WINDOW = 24
TEXTS = [
    "the quick brown fox",
    "jumps",
    "over the lazy dog, and over the lazy dog, and over the lazy dog, and so on and on until the window is full",
    "größer als das Fenster, weil jedes Zeichen ein Token ist: 日本語",
    "x",
]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that puts BOS in front by itself."""
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), vocab_size=290)


@pytest.fixture(scope="module")
def judge(tokenizer):
    """A GPT-2 of 24 positions that is sure of itself, so that context matters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=WINDOW, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def ids_of(text, tokenizer, start_token=False):
    return [tokenizer.bos_token_id] * start_token + tokenizer(text, add_special_tokens=False)["input_ids"]


def judged(texts, judge, tokenizer, **options):
    return generative_perplexity(texts, judge, tokenizer, **{"progress": False, "add_start_token": False, **options})


@torch.no_grad()
def brute_force(ids, judge, window, stride):
    """-log p of each token but the first, from a forward of its own over the context that its window leaves it."""
    nll = []
    for position in range(1, len(ids)):
        start = 0
        while position >= start + window:
            start += stride
        logits = judge(input_ids=torch.tensor([ids[start:position]])).logits[0, -1]
        nll.append(-logits.log_softmax(-1)[ids[position]].item())
    return nll


# Generative perplexity


def test_where_the_window_holds_a_text_its_perplexity_is_exp_of_the_models_own_loss(judge, tokenizer):
    text = TEXTS[0]
    ids = torch.tensor([ids_of(text, tokenizer)])
    assert 4 < ids.shape[1] <= WINDOW
    result = judged([text], judge, tokenizer)
    with torch.no_grad():
        loss = judge(input_ids=ids, labels=ids).loss.item()
    assert result.num_tokens == ids.shape[1] - 1
    assert result.nll.value == pytest.approx(loss, abs=1e-5)
    assert result.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("window, stride", [(24, 12), (24, 5), (24, 23), (24, 1), (10, 7), (2, 1)])
def test_each_token_is_scored_once_with_the_context_that_the_stride_leaves_it(judge, tokenizer, window, stride):
    rows = [ids_of(text, tokenizer) for text in TEXTS]
    assert max(map(len, rows)) > 2 * WINDOW
    expected = [nll for ids in rows for nll in brute_force(ids, judge, window, stride)]
    result = judged(TEXTS, judge, tokenizer, window=window, stride=stride)
    assert result.num_tokens == len(expected) == sum(len(ids) - 1 for ids in rows)
    assert result.nll.value == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_whole_context_and_strides_of_half_of_it_are_the_default(judge, tokenizer):
    result = judged(TEXTS, judge, tokenizer)
    assert (result.window, result.stride) == (24, 12)
    assert result.nll.value == judged(TEXTS, judge, tokenizer, window=24, stride=12).nll.value


def test_context_lowers_or_raises_the_figure_but_is_not_ignored(judge, tokenizer):
    by_stride = [judged(TEXTS, judge, tokenizer, stride=stride).nll.value for stride in (1, 12, 23)]
    assert min(abs(a - b) for a, b in zip(by_stride, by_stride[1:])) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_their_padding_change_nothing(judge, tokenizer, batch_size):
    alone = [judged([text], judge, tokenizer) for text in TEXTS[:4]]
    together = judged(TEXTS[:4], judge, tokenizer, batch_size=batch_size)
    assert together.num_tokens == sum(result.num_tokens for result in alone)
    total = sum(result.nll.value * result.num_tokens for result in alone)
    assert together.nll.value == pytest.approx(total / together.num_tokens, abs=1e-5)


def test_a_start_token_lets_the_first_token_count(judge, tokenizer):
    ids = ids_of(TEXTS[0], tokenizer, start_token=True)
    expected = np.mean(brute_force(ids, judge, 24, 12))
    # As this tokenizer does by itself.
    for add_start_token in (True, None):
        result = judged([TEXTS[0]], judge, tokenizer, add_start_token=add_start_token)
        assert result.num_tokens == len(ids) - 1
        assert result.nll.value == pytest.approx(expected, abs=1e-5)
    # Written out, it is not put there twice.
    assert judged([f"<s>{TEXTS[0]}"], judge, tokenizer, add_start_token=True).nll.value == pytest.approx(expected)
    assert judged([TEXTS[0]], judge, tokenizer).num_tokens == len(ids) - 2


def test_eos_is_context_and_never_scored(judge, tokenizer):
    ids = ids_of("the fox</s>over the dog</s>", tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 2
    nll = brute_force(ids, judge, 24, 12)
    expected = [value for token, value in zip(ids[1:], nll) if token != tokenizer.eos_token_id]
    result = judged(["the fox</s>over the dog</s>"], judge, tokenizer)
    assert result.num_tokens == len(expected) == len(nll) - 2
    assert result.nll.value == pytest.approx(np.mean(expected), abs=1e-5)


def test_texts_too_short_to_be_scored_are_counted(judge, tokenizer):
    result = judged(["x", "", TEXTS[0]], judge, tokenizer)
    assert (result.num_texts, result.num_unscored_texts) == (3, 2)
    assert result.nll.value == judged([TEXTS[0]], judge, tokenizer).nll.value


def test_the_standard_error_is_that_of_a_ratio_over_texts(judge, tokenizer):
    texts = TEXTS[:4]
    rows = [brute_force(ids_of(text, tokenizer), judge, 24, 12) for text in texts]
    total, number = sum(map(len, rows)), len(rows)
    mean = sum(map(sum, rows)) / total
    residuals = [sum(row) - mean * len(row) for row in rows]
    expected = math.sqrt(number / (number - 1) * sum(value**2 for value in residuals)) / total
    result = judged(texts, judge, tokenizer)
    assert result.nll.standard_error == pytest.approx(expected, rel=1e-4)
    assert result.perplexity.standard_error == pytest.approx(expected * math.exp(mean), rel=1e-4)


def test_the_judge_stays_in_the_mode_it_was_in_and_judges_without_dropout(judge, tokenizer):
    judge.train()
    try:
        values = {judged(TEXTS, judge, tokenizer).nll.value for _ in range(3)}
        assert judge.training
    finally:
        judge.eval()
    assert len(values) == 1


def test_a_judge_that_sees_what_it_predicts_is_refused(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    masked = BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    for model in (masked, random_model(vocab_size=len(tokenizer)), random_model(vocab_size=300, block_size=1)):
        with pytest.raises(ValueError, match=f"judge must be an autoregressive model, but a {type(model).__name__}"):
            judged(TEXTS, model, tokenizer)


def test_what_cannot_be_judged_is_refused(judge, tokenizer):
    def refused(message, texts=TEXTS, **options):
        with pytest.raises(ValueError, match=message):
            judged(texts, options.pop("model", judge), tokenizer, **options)

    refused(r"`window` must be at least 2 tokens and at most 24, the model's context,.* but got 25", window=25)
    refused(r"`stride` must be at least 1 and less than `window` \(24\).* but got 24", stride=24)
    refused(r"`stride` must be at least 1 .* but got 0", stride=0)
    refused("batch_size=0 must be at least 1", batch_size=0)
    refused("texts must hold strings, but text 1 is None", texts=["a", None])
    refused(r"texts holds no token to score \(2 texts\)", texts=["x", ""])
    refused(r"texts holds no token to score \(0 texts\)", texts=[])
    small = GPT2LMHeadModel(GPT2Config(vocab_size=280, n_positions=24, n_embd=8, n_layer=1, n_head=1))
    refused(f"tokenizer has {len(tokenizer)} tokens, but the judge's vocabulary has 280", model=small)


# Statistics of the samples


def test_entropy_is_that_of_the_frequencies_in_nats():
    assert token_entropy([7] * 9) == 0
    assert token_entropy(range(64)) == pytest.approx(math.log(64))
    assert token_entropy([1, 1, 1, 5]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    with pytest.raises(ValueError, match="at least one token"):
        token_entropy([])


def test_repetition_counts_the_ngrams_that_came_before():
    ids = [1, 2, 1, 2, 1, 3]  # bigrams 12 21 12 21 13
    assert [repetition(ids, n) for n in (1, 2, 3, 6)] == [
        pytest.approx(v) for v in (1 - 3 / 6, 1 - 3 / 5, 1 - 3 / 4, 0)
    ]
    with pytest.raises(ValueError, match="n=7: a sample of 6 tokens has no such n-gram"):
        repetition(ids, 7)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        repetition(ids, 0)


def distinct_by_hand(samples, n):
    grams = [tuple(ids[i : i + n]) for ids in samples for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def test_distinct_ngrams_are_counted_over_all_samples_and_jackknifed():
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 6, size=size).tolist() for size in (4, 9, 1, 30, 12)]
    assert distinct([[1, 2, 1], [2, 1]], 2).value == 2 / 3
    for n in (1, 2, 3):
        estimate = distinct(samples, n)
        assert estimate.value == pytest.approx(distinct_by_hand(samples, n))
        without = np.array([distinct_by_hand(samples[:i] + samples[i + 1 :], n) for i in range(5)])
        expected = math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
        assert estimate.standard_error == pytest.approx(expected)


def test_boundary_tokens_are_no_part_of_a_sample():
    bos, eos, pad = 0, 1, 2
    samples = [
        [bos, 5, 6, 5, eos, pad, pad],
        [bos, 5, 6, 7, 8],
        [bos, 5, eos, 6, pad],
        [bos, eos],
        torch.tensor([5, eos]),
    ]
    statistics = sample_statistics(samples, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    lengths = [3, 4, 3, 0, 1]
    assert statistics.length.value == np.mean(lengths)
    assert statistics.length.standard_error == pytest.approx(np.std(lengths, ddof=1) / math.sqrt(5))
    assert statistics.length_quantiles == [0, 1, 3, 3, 4]
    assert statistics.ended_by_eos.value == 3 / 5
    assert (statistics.num_samples, statistics.num_empty_samples) == (5, 1)
    entropies = [token_entropy(ids) for ids in ([5, 6, 5], [5, 6, 7, 8], [5, eos, 6], [5])]
    assert statistics.entropy.value == pytest.approx(np.mean(entropies))
    assert statistics.entropy.standard_error == pytest.approx(np.std(entropies, ddof=1) / 2)
    assert statistics.repetition[1].value == pytest.approx(np.mean([1 / 3, 0, 0, 0]))
    assert statistics.distinct[4].value == 1
    assert statistics.repetition[4].value == 0


def test_gpt2_samples_whose_boundaries_are_one_token_are_told_apart():
    statistics = sample_statistics([[9, 5, 6, 9, 9], [9, 5, 6]], bos_token_id=9, eos_token_id=9, pad_token_id=9)
    assert statistics.length.value == 2
    assert statistics.ended_by_eos.value == 0.5


def test_without_samples_or_ngrams_there_are_no_figures():
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        sample_statistics([])
    statistics = sample_statistics([[3, 3]])
    assert statistics.distinct[3] is None and statistics.repetition[3] is None and statistics.ended_by_eos is None
    empty = sample_statistics([[]])
    assert empty.entropy is None and empty.length.value == 0


def test_json_holds_every_figure_and_nothing_that_is_no_json(judge, tokenizer, tmp_path):
    def load(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    result = judged(TEXTS[:1], judge, tokenizer)
    figures = load(result.to_json(tmp_path / "figures.json"))
    assert load((tmp_path / "figures.json").read_text()) == figures
    assert figures["perplexity"] == {"value": result.perplexity.value, "standard_error": None}
    assert figures["num_tokens"] == result.num_tokens
    statistics = load(sample_statistics([[1, 2], [1]]).to_json())
    assert statistics["distinct"]["1"]["value"] == pytest.approx(2 / 3)
    assert statistics["distinct"]["4"] is None


# bd3lm quality


@pytest.fixture(scope="module")
def judge_folder(judge, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_command_writes_what_the_functions_say(judge, tokenizer, judge_folder, tmp_path, capsys, suffix):
    samples = [*TEXTS[:4], "ended</s>"]
    path = tmp_path / f"samples.{suffix}"
    lines = samples if suffix == "txt" else [json.dumps({"prompt": "", "text": text}) for text in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["quality", str(path), "--judge", str(judge_folder), "--stride", "7", "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "quality.json")]) == 0
    figures = json.loads((tmp_path / "quality.json").read_text())
    expected = judged(samples, judge, tokenizer, stride=7, add_start_token=None)
    assert figures["generative_perplexity"]["perplexity"]["value"] == pytest.approx(expected.perplexity.value)
    assert figures["statistics"]["ended_by_eos"]["value"] == 1 / 5
    lengths = [len(ids_of(text, tokenizer)) for text in [*TEXTS[:4], "ended"]]
    assert figures["statistics"]["length"]["value"] == pytest.approx(np.mean(lengths))
    assert f"generative perplexity {expected.perplexity}" in capsys.readouterr().out


def test_samples_without_a_written_eos_do_not_tell_what_ended_them(judge_folder, tmp_path, capsys):
    (tmp_path / "samples.txt").write_text("one fox\n\nthe other\n")
    path = tmp_path / "quality.json"
    assert main(["quality", str(tmp_path / "samples.txt"), "--judge", str(judge_folder), "--json", str(path)]) == 0
    statistics = json.loads(path.read_text())["statistics"]
    assert (statistics["num_samples"], statistics["ended_by_eos"]) == (2, None)
    assert "EOS" not in capsys.readouterr().out


def test_the_command_refuses_what_holds_no_samples(judge_folder, tmp_path, capsys):
    def error(path):
        assert main(["quality", str(path), "--judge", str(judge_folder)]) == 2
        return capsys.readouterr().err

    assert "is no file" in error(tmp_path)
    assert "is no file" in error(tmp_path / "missing.txt")
    (tmp_path / "blank.txt").write_text("\n\n")
    assert "holds no text" in error(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert "is not UTF-8 text" in error(tmp_path / "latin.txt")
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    assert "text_column='text' is not a column" in error(tmp_path / "other.jsonl")
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert "row 1 has nothing in the column 'text'" in error(tmp_path / "null.jsonl")
