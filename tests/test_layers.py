"""The functions that keep less for their gradients compute what the plain formulation does, and step aside in time."""

import pytest
import torch
from conftest import random_model
from torch import nn
from torch.nn.functional import gelu, layer_norm

from bd3lm_hf.modeling import layers_bd3lm, loss_block_diffusion
from bd3lm_hf.modeling.linear_bd3lm import GatedLinear, GatedMLP, NormedLinear
from bd3lm_hf.modeling.loss_block_diffusion import subs_loss
from benchmarks.dense import dense_loss


EPSILON = 1e-5
# Hidden size 6 and a middle of 15: the last of the slices is a short one.
HIDDEN, MIDDLE = 6, 15


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normed_linear(states, norm_weight, norm_bias, *parameters):
    normed = layer_norm(states, (HIDDEN,), norm_weight, norm_bias, EPSILON)
    return tuple(nn.functional.linear(normed, *pair) for pair in zip(parameters[::2], parameters[1::2]))


def gated_linear(residual, states, weight, bias, gate):
    return residual + gate * nn.functional.linear(states, weight, bias)


def gated_mlp(states, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gate):
    normed = layer_norm(states, (HIDDEN,), norm_weight, norm_bias, EPSILON)
    middle = gelu(nn.functional.linear(normed, up_weight, up_bias), approximate="tanh")
    return states + gate * nn.functional.linear(middle, down_weight, down_bias)


def with_epsilon(function):
    return lambda states, weight, bias, *rest: function.apply(states, weight, bias, EPSILON, *rest)


CASES = {
    "normed_linear": lambda: (
        with_epsilon(NormedLinear),
        normed_linear,
        [random(2, 3, HIDDEN), random(HIDDEN), random(HIDDEN), random(4, HIDDEN), random(4), random(5, HIDDEN), None],
    ),
    "normed_linear_without_shift": lambda: (
        with_epsilon(NormedLinear),
        normed_linear,
        [random(3, HIDDEN), random(HIDDEN), None, random(4, HIDDEN), None],
    ),
    "gated_linear": lambda: (
        GatedLinear.apply,
        gated_linear,
        [random(2, 3, HIDDEN), random(2, 3, 4), random(HIDDEN, 4), random(HIDDEN), random(HIDDEN)],
    ),
    "gated_linear_without_bias": lambda: (
        GatedLinear.apply,
        gated_linear,
        [random(2, 3, HIDDEN), random(2, 3, 4), random(HIDDEN, 4), None, random(HIDDEN)],
    ),
    "gated_mlp": lambda: (
        with_epsilon(GatedMLP),
        gated_mlp,
        [
            *(random(2, 3, HIDDEN), random(HIDDEN), random(HIDDEN)),
            *(random(MIDDLE, HIDDEN), random(MIDDLE), random(HIDDEN, MIDDLE), random(HIDDEN), random(HIDDEN)),
        ],
    ),
}


def values_and_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (output.double() ** 2 * torch.arange(1, output.numel() + 1).view(output.shape)).sum() for output in outputs
    )
    return [*outputs, *torch.autograd.grad(total, [tensor for tensor in inputs if tensor is not None])]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    fused, _, inputs = CASES[name]()
    assert torch.autograd.gradcheck(fused, inputs)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_formulation(name):
    fused, plain, inputs = CASES[name]()
    for got, expected in zip(values_and_gradients(fused, inputs), values_and_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_its_precision_and_keeps_that_of_the_gradients(name):
    fused, plain, inputs = CASES[name]()
    inputs = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = values_and_gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = values_and_gradients(fused, inputs)
        precisions = [tensor.dtype for tensor in values_and_gradients(plain, inputs)]
    assert [tensor.dtype for tensor in results] == precisions
    for got, exact in zip(results, expected, strict=True):
        assert (got.float() - exact).norm() < 0.03 * exact.norm()
        assert not torch.equal(got.float(), exact)


@pytest.fixture
def fused_calls(monkeypatch):
    """Which of the fused functions were called, in order."""
    calls = []
    for function in (NormedLinear, GatedLinear, GatedMLP):
        forward = function.forward

        def recorded(*arguments, forward=forward, name=function.__name__):
            calls.append(name)
            return forward(*arguments)

        monkeypatch.setattr(function, "forward", staticmethod(recorded))
    return calls


def training_gradients(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 22, (3, 32))
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_layer_takes_them_and_trains_as_without_them(fused_calls, monkeypatch):
    model = random_model(attn_implementation="sdpa")
    gradients = training_gradients(model)
    # In the last layer, the queries are those of the predicted tokens alone.
    half = ["GatedLinear", "GatedMLP"]
    assert fused_calls == ["NormedLinear", *half, "NormedLinear", "NormedLinear", *half]
    monkeypatch.setattr(layers_bd3lm, "can_be_fused", lambda *modules, constants: False)
    plain = training_gradients(model)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def hook(model):
    seen = []
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(lambda *_: seen.append(1))
    return lambda: len(seen) == 3 * 3 - 2


def wrap(model):
    class Wrapped(type(model.model.layers[0].mlp.up_proj)):
        calls = 0

        def forward(self, states):
            Wrapped.calls += 1
            return super().forward(states)

    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
            module.__class__ = Wrapped
    return lambda: Wrapped.calls == 6


@pytest.mark.parametrize("change", [hook, wrap])
def test_hooked_and_wrapped_modules_are_called(change, fused_calls):
    model = random_model(attn_implementation="sdpa")
    expected = training_gradients(model)
    fused_calls.clear()
    were_called = change(model)
    gradients = training_gradients(model)
    # At most the keys and values of the last layer are left to them.
    assert were_called() and set(fused_calls) <= {"NormedLinear"}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("setting", [{"time_conditioning": True}, {"hidden_dropout": 0.1}, {"adaln": False}])
def test_gates_per_token_dropout_and_no_gates_take_the_plain_way(setting, fused_calls):
    training_gradients(random_model(attn_implementation="sdpa", **setting))
    assert set(fused_calls) <= {"NormedLinear"}


def test_frozen_weights_get_no_gradients(fused_calls):
    model = random_model(attn_implementation="sdpa").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    assert training_gradients(model).keys() == {"model.layers.0.self_attn.q_proj.weight"}
    assert not fused_calls


@torch.no_grad()
def test_generation_takes_the_modules(fused_calls):
    random_model(attn_implementation="sdpa").generate(torch.arange(6)[None], max_new_tokens=4)
    assert not fused_calls


@pytest.mark.parametrize("seed", range(3))
def test_the_dense_reference_of_the_benchmarks_has_the_loss_and_gradients_of_the_model(seed):
    model = random_model(attn_implementation="sdpa").train()
    # The last block is a short one.
    ids = torch.randint(0, 22, (3, 30))
    results = []
    for loss_of in (lambda: model(ids, labels=ids).loss, lambda: dense_loss(model, ids)):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = loss_of()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def saved_numel(model, ids):
    """Elements of the distinct tensors that one forward pass keeps for the backward pass, weights apart."""
    kept = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / loss.element_size()


def test_a_layer_keeps_six_times_its_states():
    arguments = {"attn_implementation": "sdpa", "hidden_size": 64, "noise_interval": (1.0, 1.0), "ignore_bos": False}
    ids = torch.randint(0, 22, (4, 64))
    small, large = (saved_numel(random_model(num_hidden_layers=layers, **arguments).train(), ids) for layers in (2, 6))
    # Both streams but the last clean block, which nobody looks at. Kept: the states before each half, queries, keys,
    # values and what was seen.
    num_states = 4 * (64 + 60) * 64
    assert 6 * num_states <= (large - small) / 4 < 6.5 * num_states


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_loss_hands_its_gradients_out_once(factor, monkeypatch):
    monkeypatch.setattr(loss_block_diffusion, "CHUNK_NUMEL", 7 * 11)
    monkeypatch.setattr(loss_block_diffusion, "VOCABULARY_SLICE", 4)
    projection = nn.Linear(8, 11)
    hidden, targets = torch.randn(20, 8, requires_grad=True), torch.randint(10, (20,))
    loss, _ = subs_loss(hidden, targets, torch.rand(20), projection, 10)
    (factor * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        (factor * loss).backward()
