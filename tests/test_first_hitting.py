"""`first_hitting` draws from the reverse process itself: its samples have the distribution that enumeration gives."""

import math
from functools import cache

import pytest
import reference
import torch
from conftest import random_model

from bd3lm_hf.modeling.samplers_block_diffusion import SAMPLERS, BlockNoise, FirstHittingSampler


# Ids 0, 1, 2 are the vocabulary, 3 is EOS, which is never sampled, and 4 is the mask token.
TOKENS, EOS, MASK = 3, 3, 4
NUM_SAMPLES, BATCH_SIZE = 40_000, 10_000
# The false-alarm rate of the claim, and how far from it a wrong sampler must be. The seed is fixed.
ALPHA, CERTAINLY_WRONG = 1e-4, 1e-12


@pytest.fixture(scope="module")
def model():
    model = random_model(
        seed=3,
        attn_implementation="sdpa",
        vocab_size=5,
        hidden_size=16,
        block_size=2,
        max_position_embeddings=8,
        num_hidden_layers=1,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.no_grad():
        # Sharper conditionals depend more on what is revealed, so that the order of revealing shows.
        model.lm_head.weight.mul_(2.0)
    return model


def conditionals_of(model):
    """Function ids -> {position: probabilities of the three tokens}, by the dense reference, EOS left out."""
    state = model.state_dict()

    @cache
    def conditionals(ids):
        x_t = torch.tensor([ids])
        logits = reference.denoising_logits(state, model.config, x_t)
        log_probs = reference.subs_log_probs(logits, x_t, MASK)[0, :, :TOKENS]
        probabilities = (log_probs - log_probs.logsumexp(-1, keepdim=True)).exp()
        return {i: probabilities[i].tolist() for i in range(len(ids)) if ids[i] == MASK}

    return conditionals


def enumerated(model, prompt, length):
    """{ids of the whole text: probability} after denoising block by block."""
    conditionals = conditionals_of(model)
    reveal = reference.first_hitting_distribution
    texts = {tuple(prompt): 1.0}
    size = model.config.block_size
    while any(len(text) < length for text in texts):
        following = {}
        for text, probability in texts.items():
            end = min((len(text) // size + 1) * size, length)
            masked = frozenset(range(len(text), end))
            start = text + (MASK,) * (end - len(text))
            for final, q in reveal(conditionals, start, masked).items():
                following[final] = following.get(final, 0.0) + probability * q
        texts = following
    return texts


def sampled(model, prompt, length, sampler="first_hitting", seed=0):
    """Ids [NUM_SAMPLES, length] from `generate`."""
    torch.manual_seed(seed)
    prompts = torch.tensor([prompt]).expand(BATCH_SIZE, -1)
    return torch.cat(
        [
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=length - len(prompt),
                do_sample=True,
                sampler=sampler,
                suppress_tokens=[EOS],
            )
            for _ in range(NUM_SAMPLES // BATCH_SIZE)
        ]
    )


def chi_square_p_value(samples, distribution):
    """Probability of a chi-square statistic at least as large as that of `samples` against `distribution`."""
    texts = {text: cell for cell, text in enumerate(distribution)}
    observed = torch.zeros(len(texts), dtype=torch.float64)
    for text, count in zip(*samples.unique(dim=0, return_counts=True), strict=True):
        observed[texts[tuple(text.tolist())]] = count
    expected = len(samples) * torch.tensor(list(distribution.values()), dtype=torch.float64)
    assert expected.min() >= 5, "a cell too rare for the chi-square approximation"
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(texts) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


# A prompt of a whole block and four tokens after it, and one that leaves its block half revealed.
@pytest.mark.parametrize(("prompt", "length"), [([0, 2], 6), ([1], 4), ([2, 0, 1], 6)])
def test_samples_have_the_distribution_of_the_enumerated_reverse_process(model, prompt, length):
    distribution = enumerated(model, prompt, length)
    assert len(distribution) == TOKENS ** (length - len(prompt))
    assert sum(distribution.values()) == pytest.approx(1)
    samples = sampled(model, prompt, length)
    assert samples.shape == (NUM_SAMPLES, length)
    assert chi_square_p_value(samples, distribution) > ALPHA


class LeftToRight(FirstHittingSampler):
    """Always reveals the leftmost masked token."""

    def candidates(self, masked):
        return masked & (masked.cumsum(-1) == 1)


class AllAtOnce(FirstHittingSampler):
    """Reveals the whole block from one forward, each token as if the others stayed masked."""

    def candidates(self, masked):
        return masked


@pytest.mark.parametrize("wrong", [LeftToRight, AllAtOnce])
def test_a_wrong_sampler_does_not_pass_for_first_hitting(model, wrong, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "first_hitting", wrong)
    p_value = chi_square_p_value(sampled(model, [0, 2], 6), enumerated(model, [0, 2], 6))
    assert p_value < CERTAINLY_WRONG


def test_revealing_the_surest_token_first_has_another_distribution(model):
    p_value = chi_square_p_value(sampled(model, [0, 2], 6, "confidence"), enumerated(model, [0, 2], 6))
    assert p_value < CERTAINLY_WRONG


def test_blocks_of_one_token_are_sampled_like_an_autoregressive_model():
    model = random_model(
        seed=5,
        attn_implementation="sdpa",
        vocab_size=5,
        hidden_size=16,
        block_size=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    conditionals = conditionals_of(model)
    chain_rule = {}
    for x in range(TOKENS):
        for y in range(TOKENS):
            for z in range(TOKENS):
                factors = [conditionals(ids + (MASK,))[len(ids)] for ids in ((1,), (1, x), (1, x, y))]
                chain_rule[1, x, y, z] = factors[0][x] * factors[1][y] * factors[2][z]
    assert sum(chain_rule.values()) == pytest.approx(1)
    assert chi_square_p_value(sampled(model, [1], 4), chain_rule) > ALPHA


@pytest.mark.parametrize("num_masked", [4, 2])
def test_noise_levels_of_first_hitting_are_descending_order_statistics(num_masked):
    # Each masked token is revealed at its own uniform time (loglinear: p = t), so the next one of n goes at the
    # largest of n uniforms, then at the second largest, and so on. Kolmogorov-Smirnov, false-alarm rate 1e-5.
    torch.manual_seed(0)
    rows = 20_000
    masked = torch.zeros(rows, 4, dtype=torch.bool)
    masked[:, 4 - num_masked :] = True
    sampler, order = FirstHittingSampler(), []
    sampler.start(masked, BlockNoise(None, [], masked.shape, masked.device))
    for _ in range(num_masked):
        candidates = sampler.candidates(masked)
        order.append(sampler.mask_probability(masked))
        masked = masked & ~candidates
    assert not masked.any()
    p = torch.stack(order, -1).double()
    assert (p.diff(dim=-1) <= 0).all()
    steps = torch.arange(rows + 1, dtype=torch.float64) / rows
    for k in range(num_masked):
        x = p[:, k].sort().values
        # P(k-th largest of n uniforms <= x): at most k of them lie above x.
        cdf = sum(
            math.comb(num_masked, above) * (1 - x) ** above * x ** (num_masked - above) for above in range(k + 1)
        )
        distance = torch.maximum((steps[1:] - cdf).abs().max(), (cdf - steps[:-1]).abs().max())
        assert math.sqrt(rows) * distance < math.sqrt(-math.log(1e-5 / 2) / 2)
