"""Bans and biases of sequences hold for every sampler: whichever token of a sequence is the last to be revealed."""

import itertools
import math
import random

import pytest
import reference
import torch
from conftest import random_model
from test_first_hitting import (
    ALPHA,
    CERTAINLY_WRONG,
    MASK,
    chi_square_p_value,
    conditionals_of,
    model,  # noqa: F401
)
from test_generation import left_padded, random_prompts
from test_samplers import PROMPT, RightToLeft, levels_of, sampled

from bd3lm_hf import Sampler
from bd3lm_hf.modeling.prediction_block_diffusion import add_sequence_bias, ban_n_grams


UNKNOWN = MASK


def n_grams(ids, size):
    return list(zip(*(ids[start:] for start in range(size))))


def repeats(ids, size):
    """How many of the n-grams without an unknown token are there a second time."""
    known = [gram for gram in n_grams(ids, size) if UNKNOWN not in gram]
    return len(known) - len(set(known))


def total_bias(ids, biases):
    known = [gram for size in (2, 3, 4) for gram in n_grams(ids, size) if UNKNOWN not in gram]
    return sum(biases.get(gram, 0.0) for gram in known)


def with_token(ids, column, token):
    return [*ids[:column], token, *ids[column + 1 :]]


def random_texts(number, length, seed=0):
    """Texts of three tokens, some of them unknown, and an unknown place in each."""
    rng = random.Random(seed)
    texts = [rng.choices([0, 1, 2, UNKNOWN], [3, 3, 3, 2], k=length) for _ in range(number)]
    columns = [rng.randrange(length) for _ in texts]
    return [with_token(text, column, UNKNOWN) for text, column in zip(texts, columns)], columns


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_token_is_banned_if_and_only_if_it_completes_an_n_gram_that_is_known_elsewhere(size):
    texts, columns = random_texts(2000, 15)
    ids = torch.tensor(texts)
    is_banned = ban_n_grams(torch.zeros(2000, 5), size, ids, torch.tensor(columns), ids, UNKNOWN) == -torch.inf
    expected = [
        [repeats(with_token(text, column, token), size) > repeats(text, size) for token in range(3)]
        for text, column in zip(texts, columns)
    ]
    assert is_banned[:, :3].tolist() == expected and 200 < sum(map(sum, expected)) < 2000 * 3
    # One of an n-gram with itself, one place on.
    ids = torch.tensor([[1, UNKNOWN, 1]])
    scores = ban_n_grams(torch.zeros(1, 5), 2, ids, torch.tensor([1]), ids, UNKNOWN)
    assert (scores[0, :3] == -torch.inf).tolist() == [False, True, False]


def test_each_sequence_that_a_token_completes_adds_its_bias_once_for_each_place():
    texts, columns = random_texts(2000, 9)
    biases = {(0, 1): 0.5, (1, 1): 0.25, (2, 0, 2): -1.0, (0, 0, 0): 2.0, (1, 2, 0, 1): 4.0, (UNKNOWN, 1): 50.0}
    scores = add_sequence_bias(torch.zeros(2000, 5), biases, torch.tensor(texts), torch.tensor(columns), UNKNOWN)
    expected = [
        [total_bias(with_token(text, column, token), biases) - total_bias(text, biases) for token in range(3)]
        for text, column in zip(texts, columns)
    ]
    assert scores[:, :3].tolist() == expected
    # (1, 1) twice, which is (0, 1) once besides, and (0, 0, 0) three times.
    assert {0.0, 0.25, 0.5, 0.75, -1.0, 2.0, 4.0, 6.0} <= {value for row in expected for value in row}


# Of a prompt 0 2 and two tokens after it: what is banned or biased reaches over the border and lies within the block.
RULES = {
    "bad words": ({"bad_words_ids": [[1, 1], [2, 1, 0]]}, {(1, 1): -math.inf, (2, 1, 0): -math.inf}, 0),
    "n-grams": ({"no_repeat_ngram_size": 2}, {}, 2),
    "biases": (
        {"sequence_bias": {(1, 0): 2.0, (2, 2, 1): -1.5, (0, 0): 1.0}},
        {(1, 0): 2.0, (2, 2, 1): -1.5, (0, 0): 1.0},
        0,
    ),
    "all": (
        {"bad_words_ids": [[1, 1]], "sequence_bias": {(2, 0, 1): 1.0}, "no_repeat_ngram_size": 2},
        {(1, 1): -math.inf, (2, 0, 1): 1.0},
        2,
    ),
}


def constrained(probabilities, ids, position, biases, size):
    """The probabilities of a token at a position of a text under these rules."""
    weights = []
    for token, probability in enumerate(probabilities):
        filled = with_token(ids, position, token)
        if size and repeats(filled, size) > repeats(ids, size):
            probability = 0.0
        weights.append(probability * math.exp(total_bias(filled, biases) - total_bias(ids, biases)))
    return [weight / sum(weights) for weight in weights]


def ancestral_distribution(conditionals, start, levels, biases, size):
    """As `reference.ancestral_distribution`, but tokens of one step are drawn one after the other, from the left."""
    states = {start: 1.0}
    for before, after in zip(levels, levels[1:]):
        reveal, following = (before - after) / before, {}
        for state, probability in states.items():
            masked, plain = [index for index, token in enumerate(state) if token == MASK], conditionals(state)
            for chosen in itertools.product([False, True], repeat=len(masked)):
                drawn = {state: probability * math.prod(reveal if is_chosen else 1 - reveal for is_chosen in chosen)}
                for position in itertools.compress(masked, chosen):
                    drawn = {
                        tuple(with_token(ids, position, token)): q * p
                        for ids, q in drawn.items()
                        for token, p in enumerate(constrained(plain[position], ids, position, biases, size))
                    }
                for ids, q in drawn.items():
                    following[ids] = following.get(ids, 0.0) + q
        states = following
    return {ids: q for ids, q in states.items() if q > 0}


def first_hitting_distribution(conditionals, start, biases, size):
    def of_text(ids):
        return {i: constrained(p, ids, i, biases, size) for i, p in conditionals(ids).items()}

    masked = frozenset(index for index, token in enumerate(start) if token == MASK)
    return reference.first_hitting_distribution(of_text, start, masked)


@pytest.mark.parametrize("rule", RULES)
def test_first_hitting_draws_from_what_the_known_tokens_on_both_sides_leave(model, rule):  # noqa: F811
    arguments, biases, size = RULES[rule]
    start = (*PROMPT, MASK, MASK)
    distribution = first_hitting_distribution(conditionals_of(model), start, biases, size)
    samples = sampled(model, **arguments)
    assert chi_square_p_value(samples, distribution) > ALPHA
    free = first_hitting_distribution(conditionals_of(model), start, {}, 0)
    assert chi_square_p_value(samples, free) < CERTAINLY_WRONG


@pytest.mark.parametrize(("rule", "num_steps"), [("bad words", 1), ("n-grams", 2), ("biases", 1), ("all", 2)])
def test_tokens_that_are_revealed_together_are_drawn_in_view_of_each_other(model, rule, num_steps):  # noqa: F811
    arguments, biases, size = RULES[rule]
    start, levels = (*PROMPT, MASK, MASK), levels_of("loglinear", num_steps)
    plain = ancestral_distribution(conditionals_of(model), start, levels, {}, 0)
    published = reference.ancestral_distribution(conditionals_of(model), start, frozenset({2, 3}), levels)
    assert plain == pytest.approx(published)
    distribution = ancestral_distribution(conditionals_of(model), start, levels, biases, size)
    assert sum(distribution.values()) == pytest.approx(1)
    samples = sampled(model, sampler="ancestral", denoising_steps=num_steps, **arguments)
    assert chi_square_p_value(samples, distribution) > ALPHA
    # As if each saw what was known before the step alone.
    assert chi_square_p_value(samples, plain) < CERTAINLY_WRONG


class AllButFirst(Sampler):
    """Reveals all masked tokens of a row but the first together, then that one."""

    def candidates(self, masked):
        others = masked & (masked.cumsum(-1) > 1)
        return torch.where(others.any(-1, keepdim=True), others, masked)


SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"sampler": "ancestral", "denoising_steps": 3},
    "one step": {"sampler": "ancestral", "denoising_steps": 1},
    "remasking": {"sampler": "ancestral", "denoising_steps": 4, "remask_cap": 0.6},
    "confidence": {"sampler": "confidence", "denoising_steps": 2},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.05},
    "greedy": {"sampler": "confidence", "denoising_steps": 3, "do_sample": False},
    "entropy_bound": {"sampler": "entropy_bound", "entropy_bound": 6.0},
    "right to left": {"sampler": RightToLeft()},
    "all but the first": {"sampler": AllButFirst()},
}
BAD_WORDS = [[3, first, second] for first in range(4, 16) for second in range(24) if second % 2]
BAD_WORDS += [[first, second] for first in range(4, 12) for second in range(2, 14)] + [[13, 13, 13, 13], [14]]


@pytest.fixture(scope="module")
def small():
    """A model of few and uneven tokens, so that sequences repeat."""
    return random_model(vocab_size=25, block_size=8, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa")


def broken(text, arguments, prompt):
    """The rules that a text breaks in what was written into the `prompt`, whose gaps are `None`."""
    given = [*prompt, *[None] * (len(text) - len(prompt))]
    for word in arguments.get("bad_words_ids", []):
        for start, gram in enumerate(n_grams(text, len(word))):
            if list(gram) == word and None in given[start : start + len(word)]:
                yield word
    for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        if size := arguments.get(name):
            places = {}
            for start, gram in enumerate(n_grams(text, size)):
                places.setdefault(gram, []).append(None in given[start : start + size])
            in_prompt = n_grams(prompt, size)
            for gram, is_new in places.items():
                is_repeated = len(is_new) > 1 if name == "no_repeat_ngram_size" else gram in in_prompt
                if any(is_new) and is_repeated:
                    yield gram


BANS = (
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": BAD_WORDS, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 2},
)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rules", BANS, ids=lambda rules: ", ".join(rules))
def test_no_text_holds_what_is_banned(small, sampler, rules):
    """Prompts of several lengths, every other one with gaps, so that tokens are known after the ones to write."""
    inputs = left_padded(random_prompts([3, 12, 20, 17] * 6, vocab_size=24))
    is_gap = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    is_gap[::2] = False
    inputs["input_ids"][is_gap & (inputs["attention_mask"] == 1)] = small.config.mask_token_id
    num_broken = []
    for arguments in ({}, rules):
        arguments = SAMPLERS[sampler] | arguments | {"infill": True, "max_new_tokens": 13, "seed": 0}
        texts = small.generate(**inputs, **arguments)
        num_broken.append(0)
        for text, given, mask in zip(texts.tolist(), inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
            first = mask.index(1)
            prompt = [None if token == small.config.mask_token_id else token for token in given[first:]]
            num_broken[-1] += len(list(broken(text[first:], rules, prompt)))
    assert num_broken[0] > 5 and num_broken[1] == 0


def test_a_token_that_its_two_neighbours_leave_nothing_for_is_an_error(small):
    prompt = torch.tensor([[3, 4, small.config.mask_token_id, 6]])
    half = [[4, token] for token in range(12)] + [[token, 6] for token in range(12, 24)]
    with pytest.raises(ValueError, match="both sides of one may together ban all that it could be"):
        small.generate(prompt, infill=True, bad_words_ids=half)
    text = small.generate(prompt, infill=True, bad_words_ids=half[:-1])
    assert text.tolist() == [[3, 4, 23, 6]]


def test_scores_and_probabilities_are_those_of_the_token_that_was_settled_on(small):
    """The likeliest token in every place of one step is one; all but the first take what is left to them."""
    output = small.generate(
        torch.tensor([[1, 2]]),
        max_new_tokens=6,
        sampler="confidence",
        denoising_steps=1,
        do_sample=False,
        no_repeat_ngram_size=1,
        **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_reveal"), True),
    )
    text = output.sequences[0].tolist()
    assert len(set(text)) == 8
    for column, (scores, logits) in enumerate(zip(output.scores, output.logits), start=2):
        banned = (scores[0] == -torch.inf).nonzero().flatten().tolist()
        assert banned == sorted([*text[:column], small.config.mask_token_id])
        assert scores[0].argmax() == text[column]
        probability = logits[0].softmax(-1)[text[column]]
        torch.testing.assert_close(output.token_probabilities[0, column], probability)
