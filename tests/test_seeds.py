"""A row's tokens depend on its seed, whatever stands beside it and however the text is computed."""

import pytest
import torch
from conftest import random_model
from test_generation import left_padded, random_prompts
from transformers import DynamicCache, StaticCache

from bd3lm_hf import BD3LMGenerationConfig


SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"denoising_steps": 3},
    "remasking": {"sampler": "ancestral", "denoising_steps": 3, "remask_cap": 0.5},
    "confidence": {"denoising_steps": 2},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.1, "confidence": "margin"},
    "entropy_bound": {"entropy_bound": 2.0},
}


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return {"sampler": request.param, **SAMPLERS[request.param]}


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return random_model(
        attn_implementation=request.param,
        vocab_size=101,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def test_with_any_cache_and_without(model, sampler):
    inputs = left_padded(random_prompts([6, 6]))
    arguments = {**sampler, "max_new_tokens": 22, "seed": 3}
    expected = model.generate(**inputs, **arguments)
    assert len(expected[:, 6:].unique()) > 15
    assert torch.equal(model.generate(**inputs, **arguments, use_cache=False), expected)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        assert torch.equal(model.generate(**inputs, **arguments, cache=cache), expected)
    assert not torch.equal(model.generate(**inputs, **{**arguments, "seed": 5}), expected)


def test_alone_and_in_a_batch(model, sampler):
    prompts = random_prompts([5, 8, 1, 11])
    batch = model.generate(**left_padded(prompts), **sampler, max_new_tokens=13, seed=[4, 1, 9, 9])
    for row, (prompt, seed) in enumerate(zip(prompts, [4, 1, 9, 9])):
        alone = model.generate(prompt[None], **sampler, max_new_tokens=13, seed=seed)
        assert torch.equal(alone[0], batch[row, 11 - len(prompt) :])


BY_CONFIDENCE = {
    "probability": {"sampler": "confidence", "denoising_steps": 3},
    "margin": {"sampler": "confidence", "denoising_steps": 5, "confidence": "margin"},
    "negative_entropy": {"sampler": "confidence", "confidence": "negative_entropy"},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.6},
    "bound": {"sampler": "entropy_bound", "entropy_bound": 9.0},
    "bound of nothing": {"sampler": "entropy_bound"},
}


@pytest.mark.parametrize(("is_blank", "do_sample"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("rule", BY_CONFIDENCE)
def test_rounding_does_not_choose_among_positions_that_are_equally_sure(model, rule, is_blank, do_sample):
    """Where nothing is known, and everywhere by a model that does not read its text."""
    if is_blank:
        with torch.no_grad():
            model.lm_head.weight.zero_()
    arguments = {**BY_CONFIDENCE[rule], "do_sample": do_sample, "return_dict_in_generate": True, "output_reveal": True}
    arguments |= {"infill": True, "max_new_tokens": 5}
    prompts = [torch.full((length,), model.config.mask_token_id) for length in (4, 11, 8)]
    batch = model.generate(**left_padded(prompts), **arguments, seed=[4, 1, 9])
    caches = ({}, {"use_cache": False}, {"cache": StaticCache(config=model.config, max_cache_len=64)})
    for row, (prompt, seed, cache) in enumerate(zip(prompts, [4, 1, 9], caches)):
        alone = model.generate(prompt[None], **arguments, **cache, seed=seed)
        assert torch.equal(alone.reveal_steps[0], batch.reveal_steps[row, 11 - len(prompt) :])
        assert torch.equal(alone.sequences[0], batch.sequences[row, 11 - len(prompt) :])


def test_in_chunks_of_whole_blocks_and_in_one_go(model, sampler):
    prompt = torch.stack(random_prompts([8, 8]))
    sampler = {**sampler, "pad_token_id": 100}
    whole = model.generate(prompt, **sampler, max_new_tokens=24, seed=1)
    sequences, cache = prompt, None
    for num_new in (4, 12, 8):
        output = model.generate(
            sequences,
            **sampler,
            max_new_tokens=num_new,
            seed=1,
            cache=cache,
            return_dict_in_generate=True,
        )
        sequences, cache = output.sequences, output.cache
    assert torch.equal(sequences, whole)


def test_rows_and_returned_sequences_draw_from_seeds_of_their_own(model):
    prompt = torch.stack(random_prompts([4]))
    several = model.generate(prompt, max_new_tokens=12, num_return_sequences=3, seed=10)
    assert len(several.unique(dim=0)) == 3
    for row in range(3):
        assert torch.equal(model.generate(prompt, max_new_tokens=12, seed=10 + row)[0], several[row])


def test_blocks_of_a_row_draw_numbers_of_their_own():
    # A model that does not read its context, so that equal numbers would give equal blocks.
    model = random_model(vocab_size=101, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    text = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=40, seed=0)[0, 4:].view(10, 4)
    assert len(text.unique(dim=0)) == 10


def test_the_global_generator_is_left_alone(model):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=8, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_the_global_generator_decides(model):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(torch.tensor([[1, 2]]), max_new_tokens=16))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("seed", [-1, 1.5, True, [0, -1], "0"])
def test_a_seed_is_a_natural_number(seed):
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0, or a list of them, but got"):
        BD3LMGenerationConfig(seed=seed)


def test_a_list_has_a_seed_for_each_row(model):
    with pytest.raises(ValueError, match="`seed` must be one integer or one for each of the 2 rows, but got 3"):
        model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=4, seed=[1, 2, 3])
