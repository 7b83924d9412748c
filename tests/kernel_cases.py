"""What the tests of the kernels share: small chunks, a record of calls, batches of all kinds, and comparisons."""

import pytest
import torch
from conftest import random_model
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from bd3lm_hf import kernels
from bd3lm_hf.kernels import cpu_attention, cpu_generation, cpu_linear, cpu_loss


BATCH_SIZE, LENGTH = 3, 41


@pytest.fixture(autouse=True)
def attached_kernels(monkeypatch):
    """Attached kernels, whose chunks are small enough for texts as short as these."""
    monkeypatch.setattr(cpu_attention, "CHUNK_SIZE", 8)
    monkeypatch.setattr(cpu_attention, "MIN_GAP", 3)
    monkeypatch.setattr(cpu_loss, "CHUNK_NUMEL", 23 * 7)
    monkeypatch.setattr(cpu_loss, "KEPT_NUMEL", 23 * 20)
    was_attached = kernels.is_attached()
    kernels.attach()
    yield
    if not was_attached:
        kernels.detach()


@pytest.fixture(name="calls")
def recorded_calls(monkeypatch):
    """The names of the functions of the kernels that were called."""
    names = []
    functions = (cpu_linear.NormedLinear, cpu_linear.GatedLinear, cpu_linear.MLP, cpu_linear.Linear)
    for function in (*functions, cpu_attention.TiledAttention, cpu_loss.TokenNats):

        def forward(*arguments, original=function.forward, name=function.__name__):
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    call = cpu_generation.PackedLayer.__call__

    def packed_call(*arguments):
        names.append("PackedLayer")
        return call(*arguments)

    monkeypatch.setattr(cpu_generation.PackedLayer, "__call__", packed_call)
    return names


def whole_rows(x_0):
    return {}


def left_padding(x_0):
    return {"attention_mask": (torch.arange(LENGTH) >= torch.tensor([[0], [5], [30]])).long()}


def right_padding(x_0):
    return {"attention_mask": (torch.arange(LENGTH) < torch.tensor([[41], [23], [2]])).long()}


def packed_documents(x_0):
    return {"document_ids": (torch.arange(LENGTH) >= torch.tensor([[7], [41], [1]])).long()}


def prompts(x_0):
    # The last row is nothing but prompt.
    return {"labels": x_0.masked_fill(torch.arange(LENGTH) < torch.tensor([[3], [19], [41]]), -100)}


def two_copies(x_0):
    x_t = torch.where(torch.rand(len(x_0), 2 * LENGTH) < 0.4, 22, x_0.repeat(1, 2))
    return {
        "input_ids": x_t,
        "clean_input_ids": x_0,
        "loss_weights": torch.rand(x_t.shape) + 0.5,
        "timesteps": torch.rand(x_t.shape),
    }


LAYOUTS = [whole_rows, left_padding, right_padding, packed_documents, prompts, two_copies]
SETTINGS = {
    "default": {},
    "without_adaln": {"adaln": False},
    "noise_level_per_token": {"time_conditioning": True},
    "dropout": {"hidden_dropout": 0.3},
    "window": {"max_position_embeddings": 16},
    "block_size_1": {"block_size": 1},
    "one_block": {"block_size": 64},
}


def training_model(**overrides):
    return random_model(attn_implementation="sdpa", **overrides).train()


def batch_of(layout=whole_rows):
    torch.manual_seed(0)
    x_0 = torch.randint(22, (BATCH_SIZE, LENGTH))
    return {"input_ids": x_0, "labels": x_0, **layout(x_0)}


def training_results(model, batch, seed=1):
    """Loss, nats per token, and the gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {"loss": output.loss.detach(), "token_nelbo": output.token_nelbo.detach(), **gradients}


def assert_equal_results(found, expected, tolerance=1e-5):
    """Relative to the largest element of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=tolerance, msg=name)


def assert_trains_as_plain(model, batch):
    found = training_results(model, batch)
    with kernels.detached():
        expected = training_results(model, batch)
    assert expected["loss"] > 0
    assert_equal_results(found, expected)


class During(LogitsProcessor):
    """Calls a function at each forward of `generate`."""

    def __init__(self, function):
        self.function, self.results = function, []

    def __call__(self, input_ids, scores):
        self.results.append(self.function())
        return scores


def during_generate(model, function):
    """What a function returned in the middle of `generate`."""
    processor = During(function)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, logits_processor=LogitsProcessorList([processor]))
    assert cpu_generation.packed_weights() is None
    return processor.results[-1]


def attributes_of(model):
    tensors = (nn.Parameter, torch.Tensor)
    return {
        name: {key for key, value in vars(part).items() if not isinstance(value, tensors)}
        for name, part in model.named_modules()
    }


def generating_model(**overrides):
    return random_model(attn_implementation="sdpa", eos_token_id=None, pad_token_id=0, **overrides)
