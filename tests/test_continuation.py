"""A cache that `generate` returned, given to the next call: the same tokens as from scratch, for fewer computed."""

import pytest
import torch
from conftest import random_model
from test_generation import left_padded, random_prompts
from transformers import DynamicCache, StaticCache

from bd3lm_hf import CommitCache


EOS = 7
SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"denoising_steps": 3},
    "confidence": {"confidence_threshold": 0.2},
    "entropy_bound": {"entropy_bound": 2.0},
}


def make_model(context=64, **overrides):
    fields = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0}
    return random_model(max_position_embeddings=context, **{**fields, **overrides})


def make_cache(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=160)
    return DynamicCache() if kind == "dynamic" else None


class Reading:
    """How many tokens of each row the network was given."""

    def __init__(self, model):
        self.num_tokens = 0
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, module, arguments):
        self.num_tokens += arguments[0].shape[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def without_padding(sequences, first_columns, num_new):
    """The rows' real tokens, up to their EOS."""
    rows = []
    for row, first in zip(sequences, first_columns):
        tokens, prompt_width = row[first:], sequences.shape[1] - num_new
        ends = (tokens[prompt_width - first :] == EOS).nonzero()
        rows.append(tokens[: prompt_width - first + int(ends[0]) + 1] if len(ends) else tokens)
    return rows


def chat(model, turns, cache, **arguments):
    """Texts of a batch after several turns; with `cache` False each turn starts from scratch."""
    texts = [torch.empty(0, dtype=torch.long)] * len(turns[0])
    for seed, turn in enumerate(turns):
        inputs = left_padded([torch.cat([text, new]) for text, new in zip(texts, turn)])
        given = {} if cache is False else {"cache": cache}
        output = model.generate(**inputs, **given, **arguments, seed=seed, return_dict_in_generate=True)
        if cache is not False:
            cache = output.cache
        num_new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        firsts = (inputs["attention_mask"] == 0).sum(-1).tolist()
        texts = without_padding(output.sequences, firsts, num_new)
    return texts


@pytest.mark.parametrize("kind", ["sliding", "dynamic", "static"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_turns_of_a_chat_whose_rows_differ_in_length(kind, sampler, attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    turns = [random_prompts(lengths, seed, 30) for seed, lengths in enumerate([[3, 9, 1], [5, 2, 11], [1, 7, 4]])]
    arguments = {"sampler": sampler, **SAMPLERS[sampler], "max_new_tokens": 11}
    with Reading(model) as from_scratch:
        expected = chat(model, turns, False, **arguments)
    with Reading(model) as continued:
        actual = chat(model, turns, make_cache(kind, model), **arguments)
    assert len({len(text) for text in expected}) > 1
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert continued.num_tokens < from_scratch.num_tokens


def test_turns_far_past_the_context_while_rows_shift_against_each_other():
    model = make_model(context=16, eos_token_id=None)
    turns = [random_prompts(lengths, seed, 30) for seed, lengths in enumerate([[3, 5], *[[1, 6], [6, 1]] * 3])]
    expected = chat(model, turns, False, max_new_tokens=6)
    assert min(map(len, expected)) > 60
    for kind in ("sliding", "dynamic", "static"):
        actual = chat(model, turns, make_cache(kind, model), max_new_tokens=6)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_text_that_was_edited_is_cached_as_far_as_it_agrees():
    model = make_model(eos_token_id=None)
    prompts = torch.stack(random_prompts([16, 16], vocab_size=30))
    cache = model.generate(prompts, max_new_tokens=8, return_dict_in_generate=True).cache
    edited = prompts.clone()
    edited[0, 9] = (edited[0, 9] + 1) % 30
    expected = model.generate(edited, max_new_tokens=8, seed=0)
    with Reading(model) as reading:
        assert torch.equal(model.generate(edited, max_new_tokens=8, seed=0, cache=cache), expected)
    # Row 0 keeps two blocks of four, so two are read again before the eight forwards over blocks.
    assert reading.num_tokens == 8 + 4 + 8 * 4


def test_a_cache_that_dropped_what_is_still_seen_is_refused():
    model = make_model(context=16, eos_token_id=None)
    prompts = torch.stack(random_prompts([8, 8], vocab_size=30))
    output = model.generate(prompts, max_new_tokens=40, return_dict_in_generate=True)
    short = [output.sequences[0], output.sequences[1, :12]]
    with pytest.raises(ValueError, match="`cache` has dropped positions that the next block still sees"):
        model.generate(**left_padded(short), max_new_tokens=4, cache=output.cache)


def test_a_cache_that_the_model_filled_holds_the_first_blocks_of_the_prompts():
    model = make_model(eos_token_id=None)
    prompts = torch.stack(random_prompts([13, 13], vocab_size=30))
    cache = DynamicCache()
    model(prompts[:, :8], cache=cache)
    expected = model.generate(prompts, max_new_tokens=8, seed=0)
    assert torch.equal(model.generate(prompts, max_new_tokens=8, seed=0, cache=cache), expected)


@pytest.mark.parametrize("kind", ["sliding", "static"])
def test_a_cache_that_was_reset_starts_anew(kind):
    model = make_model(eos_token_id=None)
    prompts = torch.stack(random_prompts([13, 13], vocab_size=30))
    arguments = {"max_new_tokens": 8, "cache": make_cache(kind, model), "return_dict_in_generate": True}
    cache = model.generate(prompts.flip(1), **arguments).cache
    cache.reset()
    expected = model.generate(prompts, max_new_tokens=8, seed=0)
    assert torch.equal(model.generate(prompts, max_new_tokens=8, seed=0, cache=cache), expected)


@pytest.mark.parametrize("kind", ["sliding", "dynamic"])
def test_an_answer_is_written_again_from_the_cache_of_the_first(kind):
    model = make_model(eos_token_id=None)
    prompt = random_prompts([20], vocab_size=30)[0][None]
    first = model.generate(
        prompt, max_new_tokens=40, seed=0, cache=make_cache(kind, model), return_dict_in_generate=True
    )
    again = model.generate(prompt, max_new_tokens=40, seed=1, cache=first.cache)
    assert torch.equal(again, model.generate(prompt, max_new_tokens=40, seed=1))


@pytest.mark.parametrize("kind", ["sliding", "dynamic"])
def test_a_turn_that_is_long_for_one_row_and_short_for_the_other(kind):
    model = make_model(eos_token_id=None, context=128)
    turns = [random_prompts(lengths, seed, 30) for seed, lengths in enumerate([[20, 20], [60, 1]])]
    expected = chat(model, turns, False, max_new_tokens=30)
    actual = chat(model, turns, make_cache(kind, model), max_new_tokens=30)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def first_turn(model, lengths=(12, 12), **arguments):
    prompts = left_padded(random_prompts(lengths, vocab_size=30))
    output = model.generate(**prompts, max_new_tokens=8, seed=0, return_dict_in_generate=True, **arguments)
    return output.sequences, output.cache


def test_a_cache_from_inference_mode_is_continued_outside_of_it():
    model = make_model(eos_token_id=None)
    with torch.inference_mode():
        text, cache = first_turn(model)
    expected = model.generate(text.clone(), max_new_tokens=8, seed=0)
    assert torch.equal(model.generate(text.clone(), max_new_tokens=8, seed=0, cache=cache), expected)


def test_a_cache_from_autocast_is_continued_outside_of_it():
    model = make_model(eos_token_id=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text, cache = first_turn(model)
    assert model.generate(text, max_new_tokens=8, seed=0, cache=cache).shape == (2, 28)


@pytest.mark.parametrize("kind", ["sliding", "dynamic"])
def test_a_cache_that_was_cropped_holds_what_is_left(kind):
    model = make_model(eos_token_id=None)
    prompts = random_prompts([12, 4], vocab_size=30)
    output = model.generate(
        **left_padded(prompts), max_new_tokens=8, cache=make_cache(kind, model), return_dict_in_generate=True
    )
    output.cache.crop(-4)
    inputs = left_padded([output.sequences[0, :16], torch.cat([output.sequences[1, 8:], prompts[1]])])
    expected = model.generate(**inputs, max_new_tokens=8, seed=0)
    actual = model.generate(**inputs, max_new_tokens=8, seed=0, cache=output.cache)
    assert torch.equal(actual, expected)


def test_rows_of_a_cache_are_selected_repeated_and_reordered_with_their_text():
    model = make_model(eos_token_id=None)
    for rearrange, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ):
        text, cache = first_turn(model)
        rearrange(cache)
        expected = model.generate(text[rows], max_new_tokens=8, seed=0)
        with Reading(model) as reading:
            assert torch.equal(model.generate(text[rows], max_new_tokens=8, seed=0, cache=cache), expected)
        assert reading.num_tokens < 20 + 8 * 4


def test_a_cache_that_grew_since_or_lost_rows_unseen_is_refused():
    model = make_model(eos_token_id=None)
    text, cache = first_turn(model)
    model(text[:, :4], cache=cache)
    with pytest.raises(ValueError, match="`cache` that `generate` returned must hold what it held then, 16"):
        model.generate(text, max_new_tokens=4, cache=cache)
    text, cache = first_turn(model, cache=DynamicCache())
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="`cache` must be of the batch size of the rows to generate, 1"):
        model.generate(text[1:], max_new_tokens=4, cache=cache)


def test_a_denoising_pass_against_a_cache_has_a_gradient():
    model = make_model(eos_token_id=None)
    text, cache = first_turn(model)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    masked = torch.full((2, 4), model.config.mask_token_id)
    total = sum(model(masked, cache=CommitCache(cache, 0)).logits.sum() for _ in range(2))
    total.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
