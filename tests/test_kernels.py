"""Training and logits by the kernels of a CPU are those of the plain model."""

import pytest
import torch
from conftest import random_model
from kernel_cases import (  # noqa: F401
    LAYOUTS,
    LENGTH,
    SETTINGS,
    assert_equal_results,
    assert_trains_as_plain,
    attached_kernels,
    batch_of,
    left_padding,
    packed_documents,
    recorded_calls,
    right_padding,
    training_model,
    training_results,
    whole_rows,
)
from torch import nn

from bd3lm_hf import kernels
from bd3lm_hf.kernels import cpu_linear
from benchmarks.dense import dense_loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_gives_the_loss_and_gradients_of_the_plain_model(setting, layout, calls):
    assert_trains_as_plain(training_model(**SETTINGS[setting]), batch_of(layout))
    assert "TokenNats" in calls and {"MLP", "Linear"} & set(calls)
    assert "TiledAttention" in calls or setting == "one_block"


@pytest.mark.parametrize("is_intel", [True, False])
def test_both_matrix_kernels_give_the_gradients_of_the_plain_model(is_intel, monkeypatch):
    monkeypatch.setattr(cpu_linear, "is_intel", lambda: is_intel)
    monkeypatch.setattr(cpu_linear, "SLICE_SIZE", 5)
    for setting in ("default", "noise_level_per_token"):
        assert_trains_as_plain(training_model(**SETTINGS[setting]), batch_of(left_padding))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_logits_without_gradients_are_those_of_the_plain_model(seed):
    for setting in SETTINGS.values():
        model = random_model(seed, "sdpa", **setting)
        for layout in (whole_rows, left_padding, packed_documents):
            batch = batch_of(layout)
            x_0 = batch.pop("labels")
            for inputs in (batch, {**batch, "clean_input_ids": x_0}):
                found = model(**inputs).logits
                with kernels.detached():
                    torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def relative_error(found, expected):
    return (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-3)


@pytest.mark.parametrize("is_autocast", [True, False])
def test_bfloat16_errs_no_more_than_in_the_plain_model(is_autocast, calls):
    batch, model = batch_of(left_padding), training_model()
    with kernels.detached():
        exact = training_results(model, batch)
    model = model if is_autocast else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        found = training_results(model, batch)
        assert {"MLP", "TiledAttention", "TokenNats"} <= set(calls)
        with kernels.detached():
            plain = training_results(model, batch)
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype
        assert 0 < relative_error(found[name], value) < 1.5 * relative_error(plain[name], value) + 0.01, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_and_computes_layers_twice(use_reentrant, calls):
    batch, model = batch_of(left_padding), training_model(hidden_dropout=0.1)
    calls.clear()
    expected = training_results(model, batch)
    once = calls.count("TiledAttention")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_equal_results(training_results(model, batch), expected)
    assert calls.count("TiledAttention") == 3 * once


def test_two_checkpointed_forwards_before_one_backward():
    model, batches = training_model(), [batch_of(left_padding), batch_of()]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_equal_results(*gradients)


@pytest.mark.parametrize(
    "trained", ["q_proj", "o_proj", "up_proj", "down_proj.bias", "layernorm", "lm_head", "0.adaln"]
)
def test_frozen_weights_get_no_gradients_and_others_the_same(trained, calls):
    model = training_model().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert_trains_as_plain(model, batch_of(right_padding))
    assert "MLP" in calls


def test_a_second_backward_pass_gives_the_same_gradients():
    model, batch = training_model(), batch_of()
    loss = model(**batch).loss
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_equal_results(*gradients, tolerance=0)


def test_nats_per_token_are_differentiable():
    model, batch = training_model(), batch_of()
    results = []
    for context in (kernels.detached(), torch.enable_grad()):
        with context:
            torch.manual_seed(0)
            nelbo = model(**batch).token_nelbo
            (nelbo.pow(2) * torch.arange(LENGTH)).sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert_equal_results(*results)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("linear", [nn.functional.linear, cpu_linear.linear])
def test_the_dense_formulation_of_the_benchmarks_has_the_loss_and_gradients_of_the_model(linear, seed):
    model, ids = training_model(), batch_of()["input_ids"]
    results = []
    for loss_of in (lambda: model(ids, labels=ids).loss, lambda: dense_loss(model, ids, linear)):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = loss_of()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients})
    assert_equal_results(*results)


def test_what_is_kept_for_the_gradients_is_less():
    model = random_model(attn_implementation="sdpa", hidden_size=64, vocab_size=64, num_hidden_layers=4).train()
    batch, sizes = batch_of(), []
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    for context in (kernels.detached(), torch.enable_grad()):
        kept = {}
        with (
            context,
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.setdefault(x.data_ptr(), x), lambda x: x
            ),
        ):
            torch.manual_seed(0)
            model(**batch)
        sizes.append(sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights))
    assert sizes[1] < 0.5 * sizes[0]
