"""Offloading by accelerate: with any part of the model on disk or in memory, results are those of the plain model."""

from unittest import mock

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from conftest import random_model
from torch.testing import assert_close
from transformers import Cache

from bd3lm_hf import SAMPLERS, BD3LMForMaskedLM, kernels


IDS = torch.randint(22, (2, 16), generator=torch.Generator().manual_seed(0))
IN_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "adaln_modulation")
PARTS = (
    "model.embed_tokens",
    "model.noise_embedding",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.adaln_modulation",
    "lm_head",
)
# Each part in turn, and smaller and larger ones.
GROUPS = [*PARTS, "model.layers", *(f"model.layers.0.{name}" for name in IN_LAYER)]
TIED = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module", autouse=True)
def plain_torch():
    """An offloaded model is left to plain torch, and so is the one that it is compared with here."""
    with kernels.detached():
        yield


def device_map_of(groups, place, other):
    """These groups of modules at `place`, and all others at `other`."""
    smallest = [part for part in PARTS if part != "model.layers.0"]
    smallest += [f"model.layers.0.{name}" for name in IN_LAYER]
    return {part: place if any(f"{part}.".startswith(f"{group}.") for group in groups) else other for part in smallest}


def forward_results(model):
    """Logits, loss, and texts by each sampler with each cache."""
    model.eval()
    results = {}
    with torch.no_grad():
        results["logits"] = model(IDS).logits
        results["two streams"] = model(IDS, clean_input_ids=IDS.flip(0)).logits
        results["loss"] = model(input_ids=IDS, labels=IDS).loss
    for sampler in SAMPLERS:
        for cache in ("dynamic", "static"):
            torch.manual_seed(0)
            results[sampler, cache] = model.generate(
                IDS[:, :6], max_new_tokens=6, sampler=sampler, cache_implementation=cache
            )
    return results


def training_results(model):
    """The training loss, and the gradients of what is not offloaded: accelerate drops those of the rest."""
    model.train()
    torch.manual_seed(0)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"training loss": loss.detach(), **gradients}


class Plain:
    """A saved model, and what it computes."""

    def __init__(self, folder, **config):
        random_model(attn_implementation="sdpa", **config).save_pretrained(folder)
        self.folder = folder
        self.forward = forward_results(self.load())
        self.training = training_results(self.load())

    def load(self, **kwargs):
        return BD3LMForMaskedLM.from_pretrained(self.folder, **kwargs)

    def check(self, model):
        """All that is computed equals the plain model's; the names of the gradients that there were."""
        for name, result in forward_results(model).items():
            if result.is_floating_point():
                assert_close(
                    result, self.forward[name], atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
                )
            else:
                assert torch.equal(result, self.forward[name]), name
        training = training_results(model)
        for name, result in training.items():
            assert_close(
                result, self.training[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
        return set(training) - {"training loss"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Plain(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def is_offloaded(model, name):
    return model.get_parameter(name).device.type == "meta"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("place", "other"), [("disk", "cpu"), ("cpu", "disk")], ids=["on_disk", "all_else_on_disk"])
def test_each_part_in_turn_on_disk(plain, tmp_path, group, place, other):
    model = plain.load(device_map=device_map_of([group], place, other), offload_folder=tmp_path)
    names = [name for name, _ in model.named_parameters()]
    inside = {name for name in names if name.startswith(f"{group}.")}
    offloaded = {name for name in names if is_offloaded(model, name)}
    assert inside and offloaded == (inside if place == "disk" else set(names) - inside)
    assert plain.check(model) == set(names) - offloaded


@pytest.mark.parametrize(("place", "other"), [("disk", "cpu"), ("cpu", "disk")])
def test_tied_embeddings_on_disk_or_all_else(tied, tmp_path, place, other):
    """Stock models too want both of what is tied in one place."""
    tied.check(tied.load(device_map=device_map_of(TIED, place, other), offload_folder=tmp_path))


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("preload", [None, ["BD3LMDecoderLayer"], ["BD3LMForMaskedLM"]])
def test_the_whole_model_offloaded_to_memory(request, kind, preload):
    reference = request.getfixturevalue(kind)
    model = reference.load()
    cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=preload)
    assert is_offloaded(model, "lm_head.bias")
    assert reference.check(model) == set()


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_the_whole_model_offloaded_to_disk(request, kind, tmp_path):
    reference = request.getfixturevalue(kind)
    model = reference.load()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert is_offloaded(model, "lm_head.bias")
    assert reference.check(model) == set()


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_an_automatic_device_map_keeps_layers_whole(request, kind, tmp_path):
    reference = request.getfixturevalue(kind)
    model = reference.load()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    max_memory = {"cpu": int(0.7 * size), "disk": 10 * size}
    device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in device_map)
    reference.check(reference.load(device_map=device_map, offload_folder=tmp_path))


def test_a_cache_reaches_the_layers_by_the_name_that_hooks_skip(plain, tmp_path):
    """What moves inputs to the device of a layer leaves `_skip_keys_device_placement` where they are."""
    device_map = device_map_of(["model.layers"], "disk", "cpu")
    model = plain.load(device_map=device_map, offload_folder=tmp_path).eval()
    assert {"cache", "past_key_values"} <= set(model._skip_keys_device_placement)
    layer, given = model.model.layers[0], []

    def forward(*args, **kwargs):
        given.append(isinstance(kwargs["cache"], Cache) and not any(isinstance(value, Cache) for value in args))
        return layer_forward(*args, **kwargs)

    layer_forward = layer.forward
    with mock.patch.object(layer, "forward", forward):
        model.generate(IDS[:, :6], max_new_tokens=6)
    assert given and all(given)
