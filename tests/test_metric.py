"""What `evaluate.load` makes of the metric's folder gives the figures of `evaluate_likelihood`."""

import math

import evaluate
import pytest
import torch
from conftest import random_model
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import evaluate_likelihood, train_tokenizer
from bd3lm_hf.data.tokenization import encode_documents
from bd3lm_hf.evaluation.likelihood import NELBO_METRIC


TEXTS = ["one two three four", "", "five six seven eight nine ten", "zéro"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), vocab_size=300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny model beside its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model = random_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(NELBO_METRIC, cache_dir=str(tmp_path))


def test_the_metric_gives_the_figures_of_the_library(metric, tokenizer, folder):
    model = random_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    sequences = encode_documents(TEXTS, tokenizer)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    options = {"progress": False, "window": 8, "stride": 4}
    expected = evaluate_likelihood(model, sequences, num_bytes=num_bytes, **options).to_dict()
    assert expected["estimator"] == "exact" and expected["num_sequences"] == 3
    computed = metric.compute(predictions=TEXTS, model=str(folder), device="cpu", **options)
    assert computed.keys() == expected.keys()
    for name in ("nelbo", "perplexity", "bits_per_byte", "standard_error", "num_tokens", "num_bytes", "window"):
        assert computed[name] == pytest.approx(expected[name], rel=1e-5), name
    metric.add_batch(predictions=TEXTS[:2])
    metric.add_batch(predictions=TEXTS[2:])
    assert metric.compute(model=model, tokenizer=tokenizer, **options)["nelbo"] == pytest.approx(expected["nelbo"])


@torch.no_grad()
def test_the_metric_scores_gpt2(metric, tokenizer, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2))
    ids = torch.tensor([encode_documents(TEXTS[:1], tokenizer)[0]])
    computed = metric.compute(predictions=TEXTS[:1], model=model, tokenizer=tokenizer, progress=False)
    assert computed["perplexity"] == pytest.approx(math.exp(model.eval()(ids, labels=ids).loss.item()), rel=1e-5)


def test_what_the_metric_cannot_score_is_refused(metric, tokenizer, folder):
    with pytest.raises(ValueError, match="`sequences` must hold a token to predict, but got 0 sequences"):
        metric.compute(predictions=[""], model=str(folder), progress=False)
    with pytest.raises(ValueError, match="`tokenizer` must be the tokenizer itself"):
        metric.compute(predictions=TEXTS, model=random_model())
    with pytest.raises(ValueError, match="`tokenizer` must be a folder or a Hub id where `model` is one"):
        metric.compute(predictions=TEXTS, model=str(folder), tokenizer=tokenizer)
