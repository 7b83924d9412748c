"""Networks of Transformers, read by blocks: what each gives is what the stock class gives under the rules' masks."""

import pytest
import torch
from adapted_cases import (
    ARCHITECTURES,
    CASES,
    MASK,
    THREE,
    VARIANTS,
    adapt,
    close,
    dense_scores,
    noised,
    random_ids,
    stock_model,
)
from conftest import DEVICE
from transformers import AutoModelForCausalLM, DynamicCache

from bd3lm_hf import BlockDiffusionForMaskedLM, BlockDiffusionModel, CommitCache


LENGTH = 18


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
    again = BlockDiffusionForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE)
    bare = BlockDiffusionModel.from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE).eval()
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits)
        states = bare(ids).last_hidden_state
        close(model._logits(states)[:, :-1], model(ids).logits[:, 1:])
    for field in ("block_size", "mask_token_id", "shift_logits", "clean_attention", "vocab_size"):
        assert getattr(again.config, field) == getattr(model.config, field)
    model.config.text_config.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE).eval()
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
