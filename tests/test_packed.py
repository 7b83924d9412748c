"""What `generate` borrows on a CPU: packed weights and layers compute the same, where they may, and are given back."""

import copy
import pickle

import pytest
import torch
from conftest import random_model
from transformers import DynamicCache

from bd3lm_hf import CommitCache
from bd3lm_hf.modeling.layers_bd3lm import BD3LMMLP, BD3LMAttention, BD3LMLayerNorm
from bd3lm_hf.modeling.linear_bd3lm import HAS_ONEDNN
from bd3lm_hf.modeling.packed_bd3lm import PackedLayer, packed_weights


pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="needs a build of torch with oneDNN, which this one lacks")

OFTEN = {"num_rows": 8, "num_forwards": 100}


def modulations_of(model):
    with torch.no_grad():
        return model.model.constant_modulations(torch.device("cpu"))


@pytest.fixture
def packed_calls(monkeypatch):
    """The packed layers that were called."""
    calls, call = [], PackedLayer.__call__
    monkeypatch.setattr(
        PackedLayer, "__call__", lambda self, *args, **kwargs: calls.append(self) or call(self, *args, **kwargs)
    )
    return calls


@torch.no_grad()
def passes(model, modulations):
    """A prompt committed to a cache, a block that reads it, and two of the block's states, of two rows."""
    ids = torch.arange(24).view(2, 12) % 23
    cache = DynamicCache()
    prompt = model.model(ids[:, :8], past_key_values=cache, modulations=modulations).last_hidden_state
    kept = torch.tensor([[0, 3], [2, 1]])
    block, some = (
        model.model(ids[:, 8:], past_key_values=CommitCache(cache, 0), modulations=modulations, **arguments)
        for arguments in ({}, {"kept_positions": kept})
    )
    layer = cache.layers[-1]
    return prompt, block.last_hidden_state, some.last_hidden_state, layer.keys, layer.values


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"adaln": False}, {"hidden_size": 64, "num_hidden_layers": 3}])
def test_packed_layers_compute_the_same(options, attn_implementation, packed_calls):
    model = random_model(attn_implementation=attn_implementation, **options)
    modulations = modulations_of(model)
    expected = passes(model, modulations)
    assert not packed_calls
    with packed_weights(model, modulations, **OFTEN):
        found = passes(model, modulations)
    assert len(packed_calls) == 3 * len(model.model.layers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    assert all(layer.packed is None for layer in model.model.layers)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generated_tokens_are_those_of_plain_layers(cache, packed_calls, monkeypatch):
    # Past the context, and with a row that is padded.
    model = random_model(attn_implementation="sdpa", max_position_embeddings=32, eos_token_id=None, pad_token_id=0)
    prompts = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]])
    arguments = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 48, "seed": 7, **cache}
    expected = model.generate(prompts, output_logits=True, return_dict_in_generate=True, **arguments)
    assert packed_calls
    monkeypatch.setattr(PackedLayer, "can_replace", lambda *_: False)
    packed_calls.clear()
    found = model.generate(prompts, output_logits=True, return_dict_in_generate=True, **arguments)
    assert not packed_calls
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_linear_maps_beside_the_layers_are_packed_by_themselves():
    model = random_model(hidden_size=64)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(KeyError), packed_weights(model, None, **OFTEN):
            assert model.lm_head.packed_weight is not None
            model.lm_head.weight.data = torch.full_like(model.lm_head.weight, torch.nan)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
            raise KeyError
        assert model.lm_head.packed_weight is None
        assert model(ids).logits.isnan().all()


def test_other_passes_do_not_take_a_packed_layer(packed_calls):
    model = random_model(attn_implementation="sdpa")
    ids, modulations = torch.arange(8)[None], modulations_of(model)
    with packed_weights(model, modulations, **OFTEN):
        # With gradients, of another modulation, two streams, another precision.
        model.model(ids)
        with torch.no_grad():
            model.model(ids)
            model.model(ids, modulations=modulations_of(model))
            model.model(ids, clean_input_ids=ids)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model.model(ids, modulations=modulations)
            assert not packed_calls
            model.model(ids, modulations=modulations)
        assert packed_calls


class OtherNorm(BD3LMLayerNorm):
    pass


class OtherAttention(BD3LMAttention):
    pass


class OtherMLP(BD3LMMLP):
    pass


@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("input_layernorm", OtherNorm), ("post_attention_layernorm", OtherNorm)]
    + [("self_attn", OtherAttention), ("mlp", OtherMLP)],
)
def test_a_layer_of_other_parts_is_called(name, kind, adaln):
    model = random_model(adaln=adaln)
    getattr(model.model.layers[0], name).__class__ = kind
    with packed_weights(model, modulations_of(model), **OFTEN):
        assert [layer.packed is not None for layer in model.model.layers] == [False, True]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
def test_a_layer_with_other_biases_is_called(name):
    model = random_model()
    layer = model.model.layers[0]
    linear = getattr(layer.mlp if name in ("up_proj", "down_proj") else layer.self_attn, name)
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features)) if linear.bias is None else None
    with packed_weights(model, modulations_of(model), **OFTEN):
        assert [each.packed is not None for each in model.model.layers] == [False, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_do_not_have_what_it_was_lent(copied):
    model = random_model(hidden_size=64)
    with packed_weights(model, modulations_of(model), **OFTEN):
        other = copied(model)
        assert not [name for name in model.state_dict() if "packed" in name]
        assert model.lm_head.packed_weight is not None and model.model.layers[0].packed is not None
    assert all(getattr(module, "packed_weight", None) is None for module in other.modules())
    assert all(layer.packed is None for layer in other.model.layers)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("what", ["hook", "pre_hook", "forward", "dropout", "bfloat16", "module"])
def test_a_layer_that_is_more_than_its_weights_is_called(what, packed_calls):
    model = random_model(hidden_dropout=0.1)
    layer = model.model.layers[0]
    if what == "hook":
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    elif what == "pre_hook":
        layer.self_attn.register_forward_pre_hook(lambda *_: None)
    elif what == "forward":
        layer.input_layernorm.forward = layer.input_layernorm.forward
    elif what == "dropout":
        layer.train()
    elif what == "bfloat16":
        layer.mlp.down_proj.bfloat16()
    else:
        layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj)
    modulations = modulations_of(model)
    with packed_weights(model, modulations, **OFTEN):
        assert [each.packed is not None for each in model.model.layers] == [False, True]


@pytest.mark.parametrize("few", [{"num_rows": 1000}, {"num_forwards": 3}])
def test_weights_are_not_packed_where_that_does_not_pay(few):
    model = random_model()
    with packed_weights(model, modulations_of(model), **OFTEN | few):
        assert all(getattr(module, "packed_weight", None) is None for module in model.modules())
        assert all(layer.packed is None for layer in model.model.layers)


def test_generation_takes_packed_weights_and_leaves_none():
    model = random_model(eos_token_id=None, pad_token_id=0)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.packed_weight is not None))
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40)
    hook.remove()
    assert all(seen) and model.lm_head.packed_weight is None
