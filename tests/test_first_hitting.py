"""`first_hitting` draws from the reverse process itself: its samples have the distribution that enumeration gives."""

from functools import lru_cache

import pytest
import reference
import torch
from conftest import random_model


# Ids 0, 1, 2 are the vocabulary, 3 is EOS, which is never sampled, and 4 is the mask token.
TOKENS, EOS, MASK = 3, 3, 4
NUM_SAMPLES, BATCH_SIZE = 24_000, 6_000
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

    @lru_cache(maxsize=None)
    def conditionals(ids):
        x_t = torch.tensor([ids])
        logits = reference.denoising_logits(state, model.config, x_t)
        log_probs = reference.subs_log_probs(logits, x_t, MASK)[0, :, :TOKENS]
        probabilities = (log_probs - log_probs.logsumexp(-1, keepdim=True)).exp()
        return {i: probabilities[i].tolist() for i in range(len(ids)) if ids[i] == MASK}

    return conditionals


def enumerated(model, prompt, length, order_of=None):
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


def sampled(model, prompt, length, seed=0, **kwargs):
    """Ids [NUM_SAMPLES, length] from `generate`."""
    torch.manual_seed(seed)
    prompts = torch.tensor([prompt]).expand(BATCH_SIZE, -1)
    return torch.cat(
        [
            model.generate(
                prompts,
                max_new_tokens=length - len(prompt),
                do_sample=True,
                sampler="first_hitting",
                suppress_tokens=[EOS],
                **kwargs,
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
