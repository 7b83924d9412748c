"""The linear layer computes what torch's does, by whichever kernel, and steps aside where something rewrites it."""

import pytest
import torch
from conftest import random_model
from torch import nn

from bd3lm_hf.modeling import linear_bd3lm
from bd3lm_hf.modeling.linear_bd3lm import BD3LMLinear, linear, packed_weights


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the oneDNN kernel was called."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    calls = []
    kernel = linear_bd3lm.onednn_linear
    monkeypatch.setattr(linear_bd3lm, "onednn_linear", lambda *arguments: calls.append(1) or kernel(*arguments))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 24), (1, 1, 24)])
def test_values_and_gradients_are_those_of_nn_linear(kernel_calls, shape, bias):
    torch.manual_seed(0)
    ours, theirs = BD3LMLinear(24, 11, bias=bias), nn.Linear(24, 11, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    states = torch.randn(shape)
    results = []
    for module in (ours, theirs):
        inputs = states.clone().requires_grad_()
        output = module(inputs)
        (output * torch.arange(11)).pow(2).sum().backward()
        results.append([output, inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    # One product forward, two back.
    assert len(kernel_calls) == 3


def test_strided_matrices_need_no_copy(kernel_calls):
    states, weight = torch.randn(24, 7).t(), torch.randn(24, 11).t()
    torch.testing.assert_close(linear(states, weight), states @ weight.t(), rtol=1e-5, atol=1e-5)
    assert kernel_calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_take_torchs_own_way(kernel_calls, dtype):
    states, weight = torch.randn(3, 24, dtype=dtype), torch.randn(11, 24, dtype=dtype)
    assert torch.equal(linear(states, weight), nn.functional.linear(states, weight))
    assert not kernel_calls


def test_torchs_switch_is_obeyed(kernel_calls):
    with torch.backends.mkldnn.flags(enabled=False):
        BD3LMLinear(24, 11)(torch.randn(3, 24))
    assert not kernel_calls


def test_autocast_is_obeyed(kernel_calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BD3LMLinear(24, 11)(torch.randn(3, 24)).dtype == torch.bfloat16
    assert not kernel_calls


def test_no_tokens_give_no_rows():
    module = BD3LMLinear(24, 11)
    output = module(torch.zeros(0, 24))
    assert output.shape == (0, 11)
    output.sum().backward()
    assert torch.equal(module.weight.grad, torch.zeros(11, 24))


def test_only_wanted_gradients_are_computed(kernel_calls):
    module = BD3LMLinear(24, 11).requires_grad_(False)
    inputs = torch.randn(3, 24, requires_grad=True)
    module(inputs).sum().backward()
    assert len(kernel_calls) == 2 and inputs.grad is not None and module.weight.grad is None


def test_packed_weights_give_the_same_products_and_are_given_back():
    model = random_model(hidden_size=64)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(KeyError), packed_weights(model, num_rows=8, num_forwards=100):
            assert model.lm_head.packed_weight is not None
            model.lm_head.weight.data = torch.full_like(model.lm_head.weight, torch.nan)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
            raise KeyError
        assert model.lm_head.packed_weight is None
        assert model(ids).logits.isnan().all()


@pytest.mark.parametrize("few", [{"num_rows": 1000}, {"num_forwards": 3}])
def test_weights_are_not_packed_where_that_does_not_pay(few):
    model = random_model()
    with packed_weights(model, **{"num_rows": 8, "num_forwards": 100, **few}):
        assert all(getattr(module, "packed_weight", None) is None for module in model.modules())


def test_generation_takes_packed_weights_and_leaves_none():
    model = random_model(eos_token_id=None, pad_token_id=0)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.packed_weight is not None))
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40)
    hook.remove()
    assert all(seen) and model.lm_head.packed_weight is None
