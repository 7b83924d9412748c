"""Random combinations of samplers, bans, biases and ties: no rule is broken, and rounding chooses no position."""

import random
import time

import pytest
import torch
from conftest import random_model
from test_generation import left_padded
from test_samplers import RightToLeft
from test_sequence_rules import AllButFirst, broken
from transformers import DynamicCache, StaticCache


NUM_COMBINATIONS, NUM_QUICK = 3000, 150
VOCAB, MASK, PAD = 61, 60, 0


def random_sequences(rng, number, longest):
    """Short sequences of few tokens, so that some are met."""
    return [rng.choices(range(1, 16), k=rng.randint(1 + (longest > 1), longest)) for _ in range(number)]


def combination(seed):
    """What one call gets: (the model's choices, prompts, arguments of `generate`, whether ties are provoked)."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8, 16])
    choices = {
        "block_size": block_size,
        "attn_implementation": rng.choice(["eager", "sdpa"]),
        "time_conditioning": rng.random() < 0.3,
        # A head of zeros is equally sure everywhere, whatever is known.
        "is_blank": rng.random() < 0.15,
    }
    arguments = {"max_new_tokens": rng.randint(1, 2 * block_size + 2), "do_sample": rng.random() < 0.7, "seed": seed}
    arguments |= rng.choice(
        [
            {},
            {"sampler": "ancestral", "denoising_steps": rng.randint(1, 6)},
            {"sampler": "ancestral", "denoising_steps": 4, "remask_cap": rng.random(), "noise_schedule": "cosine"},
            {"sampler": "confidence", "denoising_steps": rng.randint(1, block_size)},
            {"sampler": "confidence", "confidence_threshold": rng.uniform(0.01, 1), "confidence": "margin"},
            {"sampler": "confidence", "confidence_threshold": rng.uniform(0.01, 1)},
            {"sampler": "confidence", "confidence": "negative_entropy"},
            {"sampler": "entropy_bound", "entropy_bound": rng.choice([0.0, rng.uniform(0, 12)])},
            {"sampler": RightToLeft()},
            {"sampler": AllButFirst()},
        ]
    )
    if arguments["do_sample"]:
        arguments |= rng.choice([{}, {}, {"temperature": 0.6}, {"top_p": rng.choice([0.0, 0.8])}, {"top_k": 5}])
    if rng.random() < 0.6:
        arguments["bad_words_ids"] = random_sequences(rng, rng.randint(1, 60), 3)
    if rng.random() < 0.5:
        arguments["no_repeat_ngram_size"] = rng.choice([2, 2, 3, 4])
    if rng.random() < 0.5:
        words = random_sequences(rng, rng.randint(1, 30), 4)
        arguments["sequence_bias"] = {tuple(word): rng.choice([-2.0, 1.0, 3.0, -float("inf")]) for word in words}
    if rng.random() < 0.2:
        arguments["encoder_no_repeat_ngram_size"] = rng.choice([2, 3])
    if rng.random() < 0.2:
        arguments["repetition_penalty"] = 1.3
    ties = rng.random() < 0.4
    prompts = [rng.choices(range(1, 29), k=rng.randint(1, 2 * block_size + 1)) for _ in range(rng.randint(1, 4))]
    if ties or rng.random() < 0.25:
        arguments["infill"] = True
        prompts = [[MASK if rng.random() < 0.3 else token for token in prompt] for prompt in prompts]
    if ties:
        # Whole blocks with nothing before them.
        prompts = [[MASK] * block_size + prompt for prompt in prompts]
    return choices, prompts, arguments, ties, rng


def rules_of(arguments):
    """The bans among the arguments; a bias of -inf is one."""
    # Of a sequence that is named twice Transformers takes the last bias.
    bias_of = arguments.get("sequence_bias", {})
    words = [list(ids) for ids, bias in bias_of.items() if bias == -float("inf")]
    return arguments | {"bad_words_ids": arguments.get("bad_words_ids", []) + words}


def make_model(is_blank, **choices):
    model = random_model(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
        adaln=True,
        **choices,
    )
    if is_blank:
        with torch.no_grad():
            model.lm_head.weight.zero_()
    return model


def check(models, seed):
    """Raises an AssertionError where a promise is broken."""
    choices, prompts, arguments, ties, rng = combination(seed)
    key = tuple(choices.values())
    model = models[key] if key in models else models.setdefault(key, make_model(**choices))
    width = max(map(len, prompts))
    inputs = left_padded([torch.tensor(prompt) for prompt in prompts])
    record = {"return_dict_in_generate": True, "output_reveal": True}
    output = model.generate(**inputs, **arguments, **record)
    assert output.sequences.shape == (len(prompts), width + arguments["max_new_tokens"])
    texts = [row[width - len(prompt) :].tolist() for row, prompt in zip(output.sequences, prompts)]
    for text, prompt in zip(texts, prompts):
        given = [None if token == MASK else token for token in prompt]
        assert MASK not in text and all(new == old for new, old in zip(text, given) if old is not None)
        assert (faults := list(broken(text, rules_of(arguments), given))) == [], faults
    if ties:
        row = rng.randrange(len(prompts))
        length = len(texts[row])
        cache = rng.choice(
            [
                {},
                {"use_cache": False},
                {"cache": DynamicCache()},
                {"cache": StaticCache(config=model.config, max_cache_len=length + 34)},
            ]
        )
        arguments = arguments | {"seed": seed + row} | cache
        alone = model.generate(torch.tensor([prompts[row]]), **arguments, **record)
        assert torch.equal(alone.reveal_steps[0], output.reveal_steps[row, -length:])
        assert alone.sequences[0].tolist() == texts[row]


def check_all(seeds):
    models = {}
    for seed in seeds:
        try:
            check(models, seed)
        except Exception as error:
            raise AssertionError(f"combination {seed}: {combination(seed)[:4]}") from error


def test_no_combination_breaks_a_rule():
    check_all(range(NUM_QUICK))


@pytest.mark.slow
def test_none_of_thousands_of_combinations_breaks_a_rule():
    check_all(range(NUM_QUICK, NUM_COMBINATIONS))


if __name__ == "__main__":
    # Runs them all and reports every failure.
    models, start, failures = {}, time.monotonic(), []
    for seed in range(NUM_COMBINATIONS):
        try:
            check(models, seed)
        except Exception as error:
            failures.append(seed)
            print(seed, type(error).__name__, str(error)[:300], combination(seed)[:4], flush=True)
        if seed % 500 == 499:
            print(seed + 1, "combinations,", len(failures), f"failures, {time.monotonic() - start:.0f} s", flush=True)
