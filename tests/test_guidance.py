"""Classifier-free guidance: the stated combination of two predictions, each what the model says of its own text."""

import pytest
import torch
from conftest import random_model
from test_generation import left_padded, random_prompts
from transformers import DynamicCache, StaticCache


SCALE = 2.5
ALL_AT_ONCE = {"sampler": "ancestral", "denoising_steps": 1}
OUTPUT = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return random_model(
        attn_implementation=request.param,
        vocab_size=101,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def logits_behind(model, prompt, offset, num_new):
    """The model's own logits of `num_new` masked tokens behind a prompt that begins at position `offset`."""
    end = -(-(offset + len(prompt) + num_new) // model.config.block_size) * model.config.block_size
    masked = prompt.new_full((end - offset - len(prompt),), model.config.mask_token_id)
    logits = model(torch.cat([prompt, masked])[None], position_ids=torch.arange(offset, end)[None]).logits[0]
    return logits[len(prompt) : len(prompt) + num_new]


@pytest.mark.parametrize("prompt_length", [1, 6, 8, 11])
@pytest.mark.parametrize("negative_length", [1, 2, 5, 8, 14])
def test_the_first_block_is_the_combination_of_two_predictions(model, prompt_length, negative_length):
    prompt, negative = random_prompts([prompt_length, negative_length])
    num_new = 4 - prompt_length % 4
    output = model.generate(
        prompt[None],
        negative_prompt_ids=negative[None],
        guidance_scale=SCALE,
        max_new_tokens=num_new,
        **ALL_AT_ONCE,
        **OUTPUT,
    )
    conditional = logits_behind(model, prompt, 0, num_new)
    # New tokens have the same place in their blocks behind either prompt.
    unconditional = logits_behind(model, negative, (prompt_length - negative_length) % 4, num_new)
    expected = SCALE * conditional + (1 - SCALE) * unconditional
    expected[:, model.config.mask_token_id] = -torch.inf
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=1e-5)


def test_later_blocks_see_what_was_generated_behind_both_prompts(model):
    prompt, negative = random_prompts([6, 9])
    output = model.generate(
        prompt[None],
        negative_prompt_ids=negative[None],
        guidance_scale=SCALE,
        max_new_tokens=14,
        **ALL_AT_ONCE,
        **OUTPUT,
    )
    new = output.sequences[0, 6:]
    for start, end in ((2, 6), (6, 10), (10, 14)):
        conditional = logits_behind(model, torch.cat([prompt, new[:start]]), 0, end - start)
        unconditional = logits_behind(model, torch.cat([negative, new[:start]]), 1, end - start)
        expected = SCALE * conditional + (1 - SCALE) * unconditional
        expected[:, model.config.mask_token_id] = -torch.inf
        torch.testing.assert_close(torch.cat(output.logits[start:end]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "entropy_bound"])
def test_alone_in_a_batch_and_with_any_cache_or_none_far_past_the_context(model, sampler):
    prompts, negatives = random_prompts([5, 8, 1]), random_prompts([3, 1, 10], seed=1)
    negative = left_padded(negatives)
    arguments = {"guidance_scale": SCALE, "sampler": sampler, "max_new_tokens": 50}
    guides = {
        "negative_prompt_ids": negative["input_ids"],
        "negative_prompt_attention_mask": negative["attention_mask"],
    }
    batch = model.generate(**left_padded(prompts), **guides, **arguments, seed=0)
    caches = [DynamicCache(), StaticCache(config=model.config, max_cache_len=96)]
    for given in ({"use_cache": False}, *({"cache": cache} for cache in caches)):
        assert torch.equal(model.generate(**left_padded(prompts), **guides, **arguments, seed=0, **given), batch)
    for row, (prompt, negative) in enumerate(zip(prompts, negatives)):
        alone = model.generate(prompt[None], negative_prompt_ids=negative[None], **arguments, seed=row)
        assert torch.equal(alone[0], batch[row, 8 - len(prompt) :])
    unguided = model.generate(**left_padded(prompts), sampler=sampler, max_new_tokens=50, seed=0)
    assert not torch.equal(batch, unguided)


def test_a_prompt_that_is_its_own_negative_guides_nowhere(model):
    prompts = left_padded(random_prompts([5, 8, 2]))
    guided = model.generate(
        **prompts,
        negative_prompt_ids=prompts["input_ids"],
        negative_prompt_attention_mask=prompts["attention_mask"],
        guidance_scale=SCALE,
        max_new_tokens=20,
        seed=0,
    )
    assert torch.equal(guided, model.generate(**prompts, max_new_tokens=20, seed=0))


def test_the_default_is_the_last_token_of_each_prompt(model):
    prompts = left_padded(random_prompts([5, 8]))
    default = model.generate(**prompts, guidance_scale=SCALE, max_new_tokens=12, seed=0)
    last = prompts["input_ids"][:, -1:]
    given = model.generate(**prompts, guidance_scale=SCALE, negative_prompt_ids=last, max_new_tokens=12, seed=0)
    assert torch.equal(default, given)


def test_one_negative_prompt_serves_all_rows_and_their_returned_sequences(model):
    prompts, (negative,) = left_padded(random_prompts([5, 8])), random_prompts([3], seed=1)
    arguments = {"guidance_scale": SCALE, "max_new_tokens": 9, "num_return_sequences": 2, "seed": 0}
    one = model.generate(**prompts, negative_prompt_ids=negative[None], **arguments)
    assert torch.equal(one, model.generate(**prompts, negative_prompt_ids=negative.expand(2, -1), **arguments))


def test_a_guided_text_is_continued_behind_both_prompts(model):
    prompt, negative = (prompt[None] for prompt in random_prompts([8, 5]))
    arguments = {"guidance_scale": SCALE, "seed": 0}
    whole = model.generate(prompt, negative_prompt_ids=negative, max_new_tokens=16, **arguments)
    first = model.generate(
        prompt, negative_prompt_ids=negative, max_new_tokens=8, return_dict_in_generate=True, **arguments
    )
    continued = model.generate(
        first.sequences,
        negative_prompt_ids=torch.cat([negative, first.sequences[:, 8:]], dim=1),
        max_new_tokens=8,
        cache=first.cache,
        **arguments,
    )
    assert torch.equal(continued, whole)


def test_a_static_cache_of_generates_own_has_room_for_a_long_negative_prompt(model):
    prompt, negative = (prompt[None] for prompt in random_prompts([2, 40]))
    arguments = {"negative_prompt_ids": negative, "guidance_scale": SCALE, "max_new_tokens": 9, "seed": 0}
    expected = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, **arguments, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"negative_prompt_ids": torch.tensor([[1]])}, "guide only with a `guidance_scale` other than 1"),
        ({"guidance_scale": 2.0, "infill": True}, "`guidance_scale` must be 1 or None with `infill`"),
        (
            {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[101]])},
            "`negative_prompt_ids` must be ids in",
        ),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[100]])}, "must not hold the mask token"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(3, 1).long()}, "one for each of the 2 prompts"),
        (
            {
                "guidance_scale": 2.0,
                "negative_prompt_ids": torch.tensor([[1, 2]]),
                "negative_prompt_attention_mask": torch.tensor([[1, 0]]),
            },
            "`negative_prompt_attention_mask` must be left-padded",
        ),
    ],
)
def test_what_cannot_guide_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 2], [3, 4]]), max_new_tokens=4, **arguments)
