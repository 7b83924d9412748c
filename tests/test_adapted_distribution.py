"""What adapted networks sample and how they score, against enumeration by dense passes of the stock class."""

import itertools
import math
from functools import cache

import pytest
import reference
import torch
from adapted_cases import adapt, dense_scores, random_ids, stock_model
from test_first_hitting import AllAtOnce, LeftToRight, chi_square_p_value

from bd3lm_hf import BlockDiffusionForMaskedLM, evaluate_likelihood
from bd3lm_hf.modeling.samplers_block_diffusion import SAMPLERS


# Ids 0, 1, 2 are the vocabulary and 3 is the mask token.
TOKENS, MASK = 3, 3
NUM_SAMPLES, BATCH_SIZE = 20_000, 10_000
ALPHA, CERTAINLY_WRONG = 1e-4, 1e-12
SMALL = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 16}
VARIANTS = [(True, "block"), (False, "block"), (True, "causal")]


def flattened(model):
    """With no text too rare to be counted."""
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
    return model


def small_pair(shift_logits, clean_attention, block_size=2):
    """A stock model, and the block diffusion model of its weights."""
    stock = flattened(stock_model("llama", seed=4, **SMALL))
    options = {"shift_logits": shift_logits, "clean_attention": clean_attention, "mask_token_id": MASK}
    source = flattened(stock_model("llama", seed=4, **SMALL))
    return stock, BlockDiffusionForMaskedLM.from_causal_lm(source, block_size=block_size, **options)


def enumerated(stock, config, prompt, length):
    """{ids of the whole text: probability} after denoising block by block."""

    @cache
    def conditionals(ids):
        x_t = torch.tensor([ids])
        start = next(i for i, token in enumerate(ids) if token == MASK) // 2 * 2
        with torch.no_grad():
            scores = dense_scores(stock, config, x_t, x_t, start // 2)[:, :TOKENS]
        probabilities = scores.double().softmax(-1)
        return {i: probabilities[i - start].tolist() for i in range(start, len(ids)) if ids[i] == MASK}

    texts = {tuple(prompt): 1.0}
    while any(len(text) < length for text in texts):
        following = {}
        for text, probability in texts.items():
            end = min((len(text) // 2 + 1) * 2, length)
            masked = frozenset(range(len(text), end))
            start = text + (MASK,) * (end - len(text))
            for final, q in reference.first_hitting_distribution(conditionals, start, masked).items():
                following[final] = following.get(final, 0.0) + probability * q
        texts = following
    return texts


def sampled(model, prompt, length):
    torch.manual_seed(0)
    prompts = torch.tensor([prompt]).expand(BATCH_SIZE, -1)
    arguments = {"max_new_tokens": length - len(prompt), "do_sample": True, "sampler": "first_hitting"}
    # Id 0 is the padding token as well.
    arguments["attention_mask"] = torch.ones_like(prompts)
    return torch.cat([model.generate(prompts, **arguments) for _ in range(NUM_SAMPLES // BATCH_SIZE)])


# A prompt of a whole block and two blocks after it, and one that leaves its block half revealed.
@pytest.mark.parametrize(
    ("shift_logits", "clean_attention", "prompt"),
    [(True, "block", [0, 2]), (True, "block", [1]), (False, "block", [1]), (True, "causal", [0, 2])],
)
def test_samples_have_the_enumerated_distribution(shift_logits, clean_attention, prompt):
    stock, model = small_pair(shift_logits, clean_attention)
    length = 6 if len(prompt) == 2 else 4
    distribution = enumerated(stock, model.config, prompt, length)
    assert len(distribution) == TOKENS ** (length - len(prompt)) and sum(distribution.values()) == pytest.approx(1)
    assert chi_square_p_value(sampled(model, prompt, length), distribution) > ALPHA


@pytest.mark.parametrize(("shift_logits", "wrong"), [(True, LeftToRight), (False, AllAtOnce)])
def test_a_wrong_sampler_does_not_pass(wrong, shift_logits, monkeypatch):
    stock, model = small_pair(shift_logits, "block")
    monkeypatch.setitem(SAMPLERS, "first_hitting", wrong)
    p_value = chi_square_p_value(sampled(model, [0, 2], 6), enumerated(stock, model.config, [0, 2], 6))
    assert p_value < CERTAINLY_WRONG


def test_other_shifts_and_attentions_have_other_distributions():
    # Samples of one variant do not pass for those of another.
    stock, model = small_pair(True, "block")
    samples = sampled(model, [0, 2], 6)
    for variant in VARIANTS[1:]:
        other = small_pair(*variant)[1]
        assert chi_square_p_value(samples, enumerated(stock, other.config, [0, 2], 6)) < CERTAINLY_WRONG


# likelihood


def brute_force(stock, config, ids):
    """The bound of a text in nats, over all masks of each block: 1/k E_{|M|=k} sum of CE_i(M), summed over k."""
    total, size, x_0 = 0.0, config.block_size, torch.tensor([ids])
    for start in range(0, len(ids), size):
        positions = [i for i in range(start, min(start + size, len(ids))) if i > 0]
        for k in range(1, len(positions) + 1):
            for masked in itertools.combinations(positions, k):
                x_t = x_0.clone()
                x_t[0, list(masked)] = config.mask_token_id
                scores = dense_scores(stock, config, x_t, x_0, start // size).double()
                scores[:, config.mask_token_id] = -math.inf
                nats = -scores.log_softmax(-1)
                total += sum(nats[i - start, ids[i]] for i in masked).item() / (k * math.comb(len(positions), k))
    return total


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("shift_logits", "clean_attention"), VARIANTS)
@torch.no_grad()
def test_exact_likelihood_equals_brute_force(block_size, shift_logits, clean_attention):
    variant = {"shift_logits": shift_logits, "clean_attention": clean_attention, "block_size": block_size}
    stock, model = stock_model("gemma3"), adapt("gemma3", **variant)
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 6)]
    expected = sum(brute_force(stock, model.config, ids) for ids in texts) / 13
    likelihood = evaluate_likelihood(model, texts, estimator="exact", batch_size=2, progress=False)
    assert likelihood.num_tokens == 13 and likelihood.block_size == block_size
    assert likelihood.nelbo == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_the_likelihood_of_block_size_1_is_that_of_the_stock_model(name):
    kind = "eager" if name == "gemma2" else "sdpa"
    stock, model = stock_model(name, kind), adapt(name, kind, block_size=1)
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (12, 7, 1)]
    # The mask token is never predicted: the stock model is to have no mass there either.
    head = stock.get_output_embeddings()
    scores = [stock(torch.tensor([ids])).logits[0].double() for ids in texts]
    assert head.weight.shape[0] == model.config.vocab_size
    for row in scores:
        row[:, model.config.mask_token_id] = -math.inf
    nats = [-row.log_softmax(-1)[range(len(ids) - 1), ids[1:]] for row, ids in zip(scores, texts, strict=True)]
    expected = torch.cat(nats).mean().item()
    likelihood = evaluate_likelihood(model, texts, progress=False)
    assert likelihood.estimator == "exact" and likelihood.num_tokens == 17
    assert likelihood.nelbo == pytest.approx(expected, rel=2e-6)
    with torch.no_grad():
        # And as a fine-tuned source would have it, to the mass that it gives to the mask token.
        plain = evaluate_likelihood(stock, texts, progress=False)
    assert plain.nelbo == pytest.approx(expected, abs=0.5) and plain.nelbo > likelihood.nelbo
