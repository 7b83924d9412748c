"""The kernels of a CPU leave alone what is more than plain layers, and can be attached and detached."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import random_model
from kernel_cases import (  # noqa: F401
    assert_equal_results,
    assert_trains_as_plain,
    attached_kernels,
    batch_of,
    recorded_calls,
    training_model,
    training_results,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bd3lm_hf import kernels


def hook_on_attention(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)


def hook_on_linear(model):
    model.model.layers[0].mlp.up_proj.register_full_backward_hook(lambda *_: None)


def own_forward(model):
    model.model.layers[0].input_layernorm.forward = model.model.layers[0].input_layernorm.forward


def subclass(model):
    model.model.layers[0].self_attn.q_proj.__class__ = type("Wrapped", (nn.Linear,), {})


def sequential(model):
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.o_proj)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r"model\.layers\.0\..*q_proj", init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def other_attention(model):
    model.model.layers[0].self_attn.__class__ = type("Other", (type(model.model.layers[0].self_attn),), {})


def other_layer(model):
    model.model.layers[0].__class__ = type("Other", (type(model.model.layers[0]),), {})


CHANGES = [hook_on_attention, hook_on_linear, own_forward, subclass, sequential, parametrized, lora, other_attention]
CHANGES += [other_layer]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_more_than_its_weights_is_called(change, calls):
    model = training_model()
    expected = training_results(model, batch_of())
    per_layer = calls.count("MLP") // 2
    change(model)
    calls.clear()
    assert_trains_as_plain(model, batch_of())
    assert calls.count("MLP") == per_layer
    if change not in (lora, sequential, parametrized):
        assert_equal_results(training_results(model, batch_of()), expected)
    calls.clear()
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, eos_token_id=None)
    assert calls.count("PackedLayer") == 40


def is_left_alone(calls):
    return not calls


@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_other_attention_is_left_alone(attn_implementation, calls, uncompiled_flex_attention):
    model = random_model(attn_implementation=attn_implementation)
    calls.clear()
    model(**batch_of())
    assert is_left_alone(calls)


def test_float64_is_left_alone(calls):
    model = training_model().double()
    calls.clear()
    model(**batch_of())
    assert is_left_alone(calls)


def test_compiled_models_are_left_alone(calls):
    model = training_model().eval()
    ids = batch_of()["input_ids"]
    expected = model(ids).logits
    calls.clear()
    found = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert is_left_alone(calls)


def test_torch_func_gets_its_gradients(calls):
    model, ids = training_model(), batch_of()["input_ids"]
    parameters = dict(model.named_parameters())
    model(ids).logits.pow(2).sum().backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    calls.clear()
    found = torch.func.grad(lambda parameters: torch.func.functional_call(model, parameters, ids).logits.pow(2).sum())(
        {name: parameter.detach() for name, parameter in parameters.items()}
    )
    assert_equal_results(found, expected)
    assert is_left_alone(calls)


def test_offloaded_layers_are_left_alone(calls):
    accelerate = pytest.importorskip("accelerate")
    model, ids = random_model(attn_implementation="sdpa"), batch_of()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        calls.clear()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.generate(ids[:1, :3], max_new_tokens=40, eos_token_id=None)
    assert is_left_alone(calls)


def test_dynamically_quantized_layers_are_left_alone(calls):
    model = random_model(attn_implementation="sdpa")
    torch.ao.quantization.quantize_dynamic(model.model.layers, {nn.Linear}, torch.qint8, inplace=True)
    ids = batch_of()["input_ids"]
    calls.clear()
    with torch.no_grad():
        found = model(ids).logits
        with kernels.detached():
            assert torch.equal(found, model(ids).logits)
    assert is_left_alone(calls)


class CountingMode(TorchDispatchMode):
    """Counts the operations that it sees."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operations_of_the_plain_model(calls):
    model, batch, counts = training_model(), batch_of(), []
    calls.clear()
    for context in (kernels.detached(), nullcontext()):
        torch.manual_seed(0)
        with context, CountingMode() as mode:
            model(**batch)
        counts.append(mode.counts)
    assert counts[0] == counts[1] and is_left_alone(calls)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions_are_those_of_the_plain_model(attn_implementation):
    model = random_model(attn_implementation=attn_implementation)
    for batch in (batch_of(), {"input_ids": batch_of()["input_ids"]}):
        outputs = []
        for context in (kernels.detached(), torch.enable_grad()):
            with context:
                outputs.append(model(**batch, output_hidden_states=True, output_attentions=True))
        for name in ("hidden_states", "attentions"):
            expected, found = (getattr(output, name) or () for output in outputs)
            assert len(expected) == len(found) and (expected or name == "attentions")
            for pair in zip(found, expected, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["model", "model.norm", "model.layers.1"])
def test_whoever_looks_at_the_last_states_finds_them_whole(place):
    model, seen = training_model(), []
    model.get_submodule(place).register_forward_hook(
        lambda module, inputs, output: seen.append(getattr(output, "last_hidden_state", output).detach())
    )
    training_results(model, batch_of())
    with kernels.detached():
        training_results(model, batch_of())
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


def test_attaching_and_detaching_twice_is_as_once():
    from bd3lm_hf.modeling.modeling_bd3lm import BD3LMDecoderLayer

    fast = BD3LMDecoderLayer.forward
    kernels.attach()
    assert kernels.is_attached() and BD3LMDecoderLayer.forward is fast
    with kernels.detached():
        plain = BD3LMDecoderLayer.forward
        assert plain is not fast and not kernels.is_attached()
        kernels.detach()
        assert BD3LMDecoderLayer.forward is plain
    assert kernels.is_attached() and BD3LMDecoderLayer.forward is not plain
    kernels.detach()
    with kernels.detached():
        pass
    assert not kernels.is_attached() and BD3LMDecoderLayer.forward is plain


def test_what_somebody_put_over_a_kernel_stays(monkeypatch):
    from bd3lm_hf.modeling.modeling_bd3lm import BD3LMModel

    def condition(self, sigma, device):
        raise NotImplementedError

    original = BD3LMModel.__dict__["condition"].__wrapped__
    BD3LMModel.condition = condition
    try:
        with kernels.detached():
            assert BD3LMModel.condition is condition
    finally:
        kernels.detach()
        BD3LMModel.condition = original


def test_a_model_of_remote_code_is_attached_by_itself(tmp_path, monkeypatch, calls):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours = training_model()
    calls.clear()
    ours.save_pretrained(tmp_path / "model")
    remote_class = get_class_from_dynamic_module("modeling_bd3lm.BD3LMForMaskedLM", str(tmp_path / "model"))
    model = remote_class.from_pretrained(tmp_path / "model", attn_implementation="sdpa").train()
    assert type(model) is not type(ours) and not kernels.is_attached(model)
    plain = training_results(model, batch_of())
    assert is_left_alone(calls)
    kernels.attach(model)
    assert kernels.is_attached(model)
    assert_equal_results(training_results(model, batch_of()), plain)
    assert {"MLP", "TiledAttention", "TokenNats"} <= set(calls)
    kernels.detach(model)
    assert not kernels.is_attached(model) and kernels.is_attached()


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model` must be a block diffusion language model, but got Linear"):
        kernels.attach(nn.Linear(2, 2))


def test_a_model_of_other_code_is_refused():
    class BD3LMDecoderLayer(nn.Module):
        def forward(self, hidden_states, pattern):
            return hidden_states

    with pytest.raises(ValueError, match="`model` must be of the code of this version.*hidden_states"):
        kernels.attach(BD3LMDecoderLayer())
