"""The kernels of a CPU compute what the plain model does, step aside in time, and leave nothing on a model."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import random_model
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bd3lm_hf import kernels
from bd3lm_hf.kernels import cpu_attention, cpu_generation, cpu_linear, cpu_loss


BATCH_SIZE, LENGTH = 3, 41


@pytest.fixture(autouse=True)
def attached(monkeypatch):
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


@pytest.fixture
def calls(monkeypatch):
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
    return {"input_ids": x_t, "clean_input_ids": x_0, "loss_weights": torch.rand(x_t.shape) + 0.5}


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_gives_the_loss_and_gradients_of_the_plain_model(setting, layout, calls):
    if layout is two_copies and SETTINGS[setting].get("time_conditioning"):
        pytest.skip("noise drawn elsewhere comes with levels of its own")
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


def test_what_is_kept_for_the_gradients_is_less():
    model = random_model(attn_implementation="sdpa", hidden_size=64, vocab_size=64, num_hidden_layers=4).train()
    batch, sizes = batch_of(), []
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    for context in (kernels.detached(), torch.enable_grad()):
        kept = {}
        with (
            context,
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x),
        ):
            torch.manual_seed(0)
            model(**batch)
        sizes.append(sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights))
    assert sizes[1] < 0.5 * sizes[0]


# Generation.


GENERATION = {
    "one_row": {},
    "confidence": {"sampler": "confidence", "denoising_steps": 2, "do_sample": False},
    "nucleus": {"top_p": 0.8},
    "static_cache": {"cache_implementation": "static"},
    "without_cache": {"use_cache": False},
    "guidance": {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("setting", ["default", "without_adaln", "noise_level_per_token", "window"])
@pytest.mark.parametrize("arguments", GENERATION)
def test_generate_draws_the_tokens_of_the_plain_model(setting, arguments, calls):
    model = random_model(attn_implementation="sdpa", eos_token_id=None, pad_token_id=0, **SETTINGS[setting])
    prompts = torch.randint(22, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])

    def generate():
        return model.generate(prompts, attention_mask=mask, seed=7, max_new_tokens=40, **GENERATION[arguments])

    found = generate()
    assert ("PackedLayer" in calls) == (setting != "noise_level_per_token")
    with kernels.detached():
        assert torch.equal(found, generate())


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_checkpoints_made_during_generate_are_plain(copied, calls):
    model = generating_model()
    attributes, keys, size = attributes_of(model), model.state_dict().keys(), len(pickle.dumps(model))
    other, found, state, found_size = during_generate(
        model, lambda: (copied(model), attributes_of(model), model.state_dict(), len(pickle.dumps(model)))
    )
    assert "PackedLayer" in calls
    assert found == attributes == attributes_of(other) == attributes_of(model)
    assert state.keys() == keys and abs(found_size - size) < 1000
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_other_threads_and_other_passes_see_no_packed_weights(calls):
    model = generating_model()

    def look():
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cpu_generation.packed_weights()))
        thread.start()
        thread.join()
        calls.clear()
        with torch.enable_grad():
            model(torch.tensor([[1, 2]])).logits.sum().backward()
        return seen, list(calls)

    assert cpu_generation.packed_weights() is None
    seen, names = during_generate(model, look)
    assert seen == [None] and "MLP" in names and "PackedLayer" not in names


@pytest.mark.parametrize("few", ["MAX_PACKED_ROWS", "MAX_PACKED_BYTES"])
def test_weights_are_not_packed_where_that_does_not_pay(few, monkeypatch, calls):
    monkeypatch.setattr(cpu_generation, few, 3)
    during_generate(generating_model(), lambda: None)
    assert "PackedLayer" not in calls


def test_short_texts_are_not_worth_packing_for(calls):
    generating_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert "PackedLayer" not in calls


# What is left alone.


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


def test_dispatch_modes_see_the_plain_model(calls):
    from torch.utils.flop_counter import FlopCounterMode

    model, batch, flops = training_model(), batch_of(), []
    calls.clear()
    for context in (kernels.detached(), torch.enable_grad()):
        torch.manual_seed(0)
        with context, FlopCounterMode(display=False) as counter:
            model(**batch)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0 and is_left_alone(calls)


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


# Attaching.


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
