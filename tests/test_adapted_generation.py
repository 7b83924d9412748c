"""Text that an adapted network writes is the same with any cache, in any batch, and by dense passes without one."""

import copy

import pytest
import torch
from adapted_cases import (
    CASES,
    GREEDY,
    MASK,
    THREE,
    VARIANTS,
    adapt,
    close,
    dense_scores,
    greedy,
    left_padded,
    random_ids,
    stock_model,
)
from transformers import DynamicCache, StaticCache


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_static_and_dynamic_caches_and_none_give_the_same_scores(name, kind):
    model, ids = adapt(name, kind), random_ids(2, 7)
    text, logits = greedy(model, ids, use_cache=False)
    assert len(text[:, 7:].unique()) >= 8
    caches = [{"cache": cache} for cache in (DynamicCache(), DynamicCache(config=model.config))]
    for options in ({}, {"cache_implementation": "static"}, *caches):
        other_text, other_logits = greedy(model, ids, **options)
        assert torch.equal(other_text, text)
        close(other_logits, logits)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_static_cache_of_the_network_is_taken_where_it_holds_the_text(name):
    model, ids = adapt(name), random_ids(1, 7)
    # Mistral's has no whole layer, so it tells nobody how long the text may get.
    cache = StaticCache(config=model.config, max_cache_len=32)
    if name == "mistral":
        with pytest.raises(ValueError, match="`cache` must"):
            greedy(model, ids, cache=cache)
    else:
        close(greedy(model, ids, cache=cache)[1], greedy(model, ids)[1])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_row_of_a_ragged_batch_is_as_alone(name, kind):
    prompts = [random_ids(1, length, seed=length)[0] for length in (3, 11, 6)]
    batch = left_padded(prompts)
    model = adapt(name, kind)
    text, logits = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(text[:, 11:].unique()) >= 8
    for row, prompt in enumerate(prompts):
        alone, logits_alone = greedy(model, prompt[None])
        assert torch.equal(text[row, 11:], alone[0, len(prompt) :])
        close(logits[:, row], logits_alone[:, 0])


def written_densely(stock, config, prompt, num_new):
    """The text that reveals the surest token of each block, one at a time, by dense passes alone."""
    length = len(prompt) + num_new
    text = torch.tensor([prompt + [MASK] * (-(-length // 4) * 4 - len(prompt))])
    for block in range(len(prompt) // 4, text.shape[1] // 4):
        while masked := [i for i in range(4 * block, min(4 * block + 4, length)) if text[0, i] == MASK]:
            scores = dense_scores(stock, config, text, text, block)
            scores[:, MASK] = -torch.inf
            best = max(masked, key=lambda i: scores[i - 4 * block].softmax(-1).max())
            text[0, best] = scores[best - 4 * block].argmax()
    return text[:, :length]


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(("shift_logits", "clean_attention"), [v for v in VARIANTS if v[0] != "noisy"])
@torch.no_grad()
def test_generation_writes_what_dense_passes_write(name, shift_logits, clean_attention):
    stock = stock_model(name)
    model = adapt(name, shift_logits=shift_logits, clean_attention=clean_attention)
    prompt = random_ids(1, 6, seed=2)[0].tolist()
    expected = written_densely(stock, model.config, prompt, 12)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        options = {**GREEDY, "no_repeat_ngram_size": None, "denoising_steps": 4, **options}
        text = model.generate(torch.tensor([prompt]), max_new_tokens=12, **options)
        assert torch.equal(text, expected)


# a returned cache


@pytest.mark.parametrize("name", [*THREE, "mistral"])
@pytest.mark.parametrize(("shift_logits", "clean_attention"), [(True, "block"), (False, "block"), (True, "causal")])
def test_a_returned_cache_gives_the_same_text_as_none(name, shift_logits, clean_attention):
    model = adapt(name, shift_logits=shift_logits, clean_attention=clean_attention)
    for lengths, options in (((3, 9, 4), {}), ((8,), {"cache": DynamicCache(config=model.config)})):
        batch = left_padded([random_ids(1, length, seed=length)[0] for length in lengths])
        first = model.generate(**batch, max_new_tokens=9, return_dict_in_generate=True, **GREEDY, **options)
        new = random_ids(len(lengths), 6, seed=7)
        turns = torch.cat([first.sequences, new], dim=1)
        padding = batch["attention_mask"]
        mask = torch.cat([padding, torch.ones(len(lengths), 15, dtype=torch.long)], dim=1)
        expected, logits = greedy(model, turns, 7, attention_mask=mask)
        cache = copy.deepcopy(first.cache)
        text, logits_of_cache = greedy(model, turns, 7, attention_mask=mask, cache=cache)
        assert torch.equal(text, expected)
        close(logits_of_cache, logits)
        # The same prompt once more: with shifted logits its last block is read again.
        again = model.generate(**batch, max_new_tokens=9, cache=first.cache, **GREEDY)
        assert torch.equal(again, first.sequences)
