"""The linear layer computes what torch's does, by whichever kernel, and steps aside where something rewrites it."""

import pytest
import torch
from torch import nn

from bd3lm_hf.modeling import linear_bd3lm
from bd3lm_hf.modeling.linear_bd3lm import BD3LMLinear, linear


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
