"""Networks of Transformers, read by blocks: what each gives is what the stock class gives under the rules' masks."""

import copy

import pytest
import torch
from adapted_cases import ARCHITECTURES, CASES, MASK, adapt, dense_logits, dense_scores, random_ids, stock_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from bd3lm_hf import BlockDiffusionForMaskedLM, BlockDiffusionModel, CommitCache


# Greedy text that repeats nothing depends on all before it.
GREEDY = {"sampler": "confidence", "do_sample": False, "no_repeat_ngram_size": 1}
LENGTH = 18
VARIANTS = [(shift, clean) for shift in (True, False, "noisy") for clean in ("block", "causal")]
# One with a single type of layers, one with two, and one with a table of positions.
THREE = ["llama", "gemma3", "gpt2"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def noised(ids, seed=1):
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(ids.device) < 0.5
    return ids.masked_fill(masked, MASK)


def left_padded(rows):
    """Prompts of several lengths [length] as one batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, ids, max_new_tokens=10, **kwargs):
    """The text, and the raw scores that it was read from [new tokens, batch, vocab]."""
    kwargs |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, **{**GREEDY, **kwargs})
    return output.sequences, torch.stack(output.logits)


@torch.no_grad()
def check_two_streams(name, kind, **variant):
    stock, model = stock_model(name, kind), adapt(name, kind, **variant)
    x_0 = random_ids(2, LENGTH)
    x_t = noised(x_0)
    logits = model(input_ids=x_t, clean_input_ids=x_0).logits
    for block in range(-(-LENGTH // 4)):
        # Shifted logits predict no first token.
        first = max(4 * block, int(bool(model.config.shift_logits)))
        for row in ([0], [1]):
            expected = dense_scores(stock, model.config, x_t[row], x_0[row], block)
            close(logits[row[0], first : 4 * block + 4], expected[first - 4 * block :])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_streams_equal_dense_passes_block_by_block(name, kind):
    check_two_streams(name, kind)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(("shift_logits", "clean_attention"), VARIANTS)
def test_two_streams_of_each_variant_equal_dense_passes(name, shift_logits, clean_attention):
    check_two_streams(name, "sdpa", shift_logits=shift_logits, clean_attention=clean_attention)


def test_flex_attention_equals_dense_passes(uncompiled_flex_attention):
    for variant in ({}, {"clean_attention": "causal", "shift_logits": False}):
        stock, model = stock_model("gemma3"), adapt("gemma3", "flex_attention", **variant)
        x_0 = random_ids(1, 10)
        x_t = noised(x_0)
        with torch.no_grad():
            logits = model(input_ids=x_t, clean_input_ids=x_0).logits
            close(logits[0, 4:8], dense_scores(stock, model.config, x_t, x_0, 1))


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_blocks_against_a_cache_equal_dense_passes(name, kind):
    stock, x_0 = stock_model(name, kind), random_ids(2, 20)
    x_t = noised(x_0)
    for clean_attention in ("block", "causal"):
        model = adapt(name, kind, shift_logits=False, clean_attention=clean_attention)
        # A cache of the network's own, whose sliding layers would drop what they think is not seen, is as good.
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            for start in range(0, 20, 4):
                block = slice(start, start + 4)
                logits = model(input_ids=x_t[:, block], cache=CommitCache(cache, 0)).logits
                for row in ([0], [1]):
                    close(logits[row[0]], dense_scores(stock, model.config, x_t[row], x_0[row], start // 4))
                model(input_ids=x_0[:, block], cache=cache)


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


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_block_size_1_with_shifted_logits_is_the_stock_model(name, kind):
    stock, model = stock_model(name, kind), adapt(name, kind, block_size=1)
    ids = random_ids(2, LENGTH)
    masked = torch.full_like(ids, MASK)
    expected = stock(ids).logits[:, :-1]
    close(model(input_ids=masked, clean_input_ids=ids).logits[:, 1:], expected)
    close(model(input_ids=ids).logits[:, 1:], expected)
    # The stock model may write the mask token, too, where a network without training knows no better.
    arguments = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}
    text = stock.generate(ids[:, :5], suppress_tokens=[MASK], **arguments)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids[:, :5], **arguments, **options), text)
    assert torch.equal(model.generate(ids[:, :5], sampler="confidence", **arguments), text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_is_read_by_both_classes(name, tmp_path):
    model, ids = adapt(name, "eager"), noised(random_ids(1, 9))
    model.save_pretrained(tmp_path)
    again = BlockDiffusionForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    bare = BlockDiffusionModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits)
        states = bare(ids).last_hidden_state
        close(model._logits(states)[:, :-1], model(ids).logits[:, 1:])
    for field in ("block_size", "mask_token_id", "shift_logits", "clean_attention", "vocab_size"):
        assert getattr(again.config, field) == getattr(model.config, field)
    model.config.text_config.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(stock(ids).logits, stock_model(name, "eager")(ids).logits)


# clean_attention = "causal": the clean stream is the autoregressive model


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_a_causal_clean_stream_keeps_the_keys_values_and_scores_of_the_source(name):
    stock, model = stock_model(name), adapt(name, clean_attention="causal")
    ids = random_ids(2, 14)
    expected, cache = DynamicCache(), DynamicCache()
    logits = stock(ids, past_key_values=expected).logits
    close(model(input_ids=ids, cache=cache).logits[:, 1:], logits[:, :-1])
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        close(layer.keys, expected_layer.keys)
        close(layer.values, expected_layer.values)
    block_wise = DynamicCache()
    adapt(name)(input_ids=ids, cache=block_wise)
    assert (block_wise.layers[1].keys - cache.layers[1].keys).abs().max() > 0.01


def written_densely(stock, config, prompt, num_new):
    """The text that reveals the surest token of each block, one at a time, by dense passes alone."""
    length = len(prompt) + num_new
    text = torch.tensor([prompt + [MASK] * (-(-length // 4) * 4 - len(prompt))])
    for block in range(len(prompt) // 4, text.shape[1] // 4):
        while (masked := [i for i in range(4 * block, min(4 * block + 4, length)) if text[0, i] == MASK]) :
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
        if True:
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
