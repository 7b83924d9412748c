"""Hundreds of random combinations of what `generate` takes keep its promises."""

import random

import pytest
import torch
from conftest import random_model
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList


NUM_COMBINATIONS = 600
VOCAB, MASK, PAD, EOS = 31, 30, 0, 29


class StopAtToken(StoppingCriteria):
    """Ends a row behind a token of one's own."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == 7


def combination(seed):
    """What one call gets: (model's choices, prompt lengths, arguments of `generate`)."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8, 16])
    model = {
        "block_size": block_size,
        "attn_implementation": rng.choice(["eager", "sdpa"]),
        "time_conditioning": rng.random() < 0.3,
        "adaln": True,
        "dtype": rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    }
    lengths = [rng.randint(1, 3 * block_size + 1) for _ in range(rng.randint(1, 5))]
    arguments = {"max_new_tokens": rng.randint(1, 3 * block_size + 2), "do_sample": rng.random() < 0.8}
    arguments |= rng.choice(
        [
            {},
            {"sampler": "first_hitting"},
            {"sampler": "ancestral", "denoising_steps": rng.randint(1, 6)},
            {"sampler": "ancestral", "denoising_steps": 4, "remask_cap": rng.random(), "noise_schedule": "cosine"},
            {"sampler": "confidence", "denoising_steps": rng.randint(1, block_size)},
            {"sampler": "confidence", "confidence_threshold": rng.uniform(0.05, 1), "confidence": "margin"},
            {"sampler": "confidence", "confidence": "negative_entropy"},
            {"sampler": "entropy_bound", "entropy_bound": rng.uniform(0, 4)},
        ]
    )
    if arguments["do_sample"]:
        arguments |= rng.choice([{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}])
    arguments |= rng.choice(
        [
            {},
            {"repetition_penalty": 1.3},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[3], [4, 5]]},
            {"suppress_tokens": [1, 2]},
            {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7, 8, EOS]},
            {"min_new_tokens": 2},
        ]
    )
    arguments |= rng.choice(
        [
            {"eos_token_id": None},
            {"eos_token_id": EOS},
            {"eos_token_id": [EOS, 11, 12, 13]},
            {"entropy_stop_threshold": 1.0, "entropy_stop_window": 6},
            {"stopping_criteria": StoppingCriteriaList([StopAtToken()])},
        ]
    )
    arguments |= rng.choice([{}, {"use_cache": False}, {"cache": "dynamic"}, {"cache": "static"}])
    arguments |= rng.choice([{}, {"seed": 3}, {"num_return_sequences": 2} if arguments["do_sample"] else {}])
    gaps = rng.random() < 0.25
    return model, lengths, arguments, gaps, rng


@pytest.fixture(scope="module")
def models():
    return {}


def model_of(models, dtype, **choices):
    key = (dtype, *choices.values())
    if key not in models:
        models[key] = random_model(
            vocab_size=VOCAB,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=PAD,
            **choices,
        ).to(dtype)
    return models[key]


def check(models, seed):
    choices, lengths, arguments, gaps, rng = combination(seed)
    model = model_of(models, **choices)
    width, num_new = max(lengths), arguments["max_new_tokens"]
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = torch.randint(1, 29, (length,), generator=generator)
    attention_mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    if gaps:
        input_ids[attention_mask & (torch.rand(input_ids.shape, generator=generator) < 0.3)] = MASK
        arguments["infill"] = True
    cache = arguments.pop("cache", None)
    copies = arguments.get("num_return_sequences", 1)
    if cache == "dynamic":
        arguments["cache"] = DynamicCache()
    elif cache == "static":
        arguments["cache"] = StaticCache(config=model.config, max_cache_len=width + num_new + 34)
    torch.manual_seed(seed)
    output = model.generate(
        input_ids,
        attention_mask=attention_mask.long(),
        return_dict_in_generate=True,
        output_logits=not gaps,
        **arguments,
    )

    sequences = output.sequences
    assert sequences.shape[0] == copies * len(lengths)
    assert width < sequences.shape[1] <= width + num_new
    expected = input_ids.repeat_interleave(copies, 0)
    given = expected != MASK
    assert torch.equal(sequences[:, :width][given], expected[given])
    real = torch.cat([attention_mask.repeat_interleave(copies, 0), torch.ones_like(sequences[:, width:]).bool()], 1)
    assert not (sequences[real] == MASK).any() and (sequences >= 0).all() and (sequences < VOCAB).all()
    ends = arguments.get("eos_token_id") or "stopping_criteria" in arguments or "entropy_stop_threshold" in arguments
    if not ends:
        assert sequences.shape[1] == width + num_new
    if arguments.get("eos_token_id"):
        eos = torch.tensor(arguments["eos_token_id"])
        for row in sequences[:, width:]:
            stops = torch.isin(row, eos).nonzero()
            if len(stops):
                assert (row[int(stops[0]) + 1 :] == PAD).all()
    if output.logits is not None:
        for logits in output.logits:
            assert not logits.isnan().any()
    assert (output.num_forward_passes >= 1).all() and output.tokens_per_forward.isfinite().all()


@pytest.mark.parametrize("part", range(6))
def test_random_combinations_keep_their_promises(models, part):
    share = NUM_COMBINATIONS // 6
    for seed in range(part * share, (part + 1) * share):
        try:
            check(models, seed)
        except Exception as error:
            raise AssertionError(f"combination {seed}: {combination(seed)[:4]}") from error
