"""A saved model with missing, misshapen or ruined tensors is refused by name."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from bd3lm_hf.hub.weights import MOST_NAMES, check_saved_weights, holds_numbers


WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def with_value(state, name, value):
    changed = state[name].clone()
    changed.view(-1)[-1] = value
    return state | {name: changed}


# What is done to the weights, and what the error says.
FAULTS = {
    "missing": (lambda state: without(state, UP), f"it lacks {UP}"),
    "missing head": (lambda state: without(state, "lm_head.bias"), "it lacks lm_head.bias"),
    "shape": (lambda state: state | {UP: state[UP][:-8].clone()}, rf"other shapes.*{UP} \(120, 32\) for \(128, 32\)"),
    "transposed": (lambda state: state | {UP: state[UP].T.contiguous()}, rf"{UP} \(32, 128\) for \(128, 32\)"),
    "surplus layer": (
        lambda state: state | {UP.replace(".0.", ".1."): state[UP].clone()},
        "the model has no model.layers.1.mlp.up_proj.weight",
    ),
    "NaN": (lambda state: with_value(state, UP, torch.nan), f"NaN or infinities in {UP}"),
    "infinity": (lambda state: with_value(state, UP, torch.inf), f"NaN or infinities in {UP}"),
    "bias": (lambda state: with_value(state, "lm_head.bias", torch.nan), "NaN or infinities in lm_head.bias"),
    "diverged": (
        lambda state: {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()},
        "NaN or infinities in lm_head.bias, .* and [0-9]+ more",
    ),
    "half precision": (lambda state: with_value(state, UP, torch.nan) | {UP: state[UP].bfloat16() * torch.nan}, UP),
}


@pytest.fixture(params=[{}, {"max_shard_size": "40KB"}], ids=["file", "shards"])
def saved(request, tmp_path):
    random_model(num_hidden_layers=1, hidden_size=32).save_pretrained(tmp_path, **request.param)
    return tmp_path


def weight_files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def change(folder, fault):
    """Applies it to the weights of a folder, in one file."""
    state = {}
    for name in weight_files(folder):
        state |= load_file(folder / name)
        (folder / name).unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(FAULTS[fault][0](state), folder / WEIGHTS, metadata={"format": "pt"})


def test_a_whole_model_passes_in_one_file_and_in_shards(saved):
    check_saved_weights(saved, weight_files(saved))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(saved, fault):
    change(saved, fault)
    with pytest.raises(ValueError, match=FAULTS[fault][1]) as raised:
        check_saved_weights(saved, [WEIGHTS])
    assert str(saved) in str(raised.value)


def test_a_shard_that_is_left_out_is_missing_tensors(tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path, max_shard_size="40KB")
    first, *others = weight_files(tmp_path)
    with pytest.raises(ValueError, match=f"it lacks .*{next(iter(sorted(load_file(tmp_path / first))))}"):
        check_saved_weights(tmp_path, others)


def test_a_tied_head_is_not_missing_and_a_mask_token_that_never_comes_is_no_fault(tmp_path):
    model = random_model(num_hidden_layers=1, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.bias[model.config.mask_token_id] = -torch.inf
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    check_saved_weights(tmp_path, [WEIGHTS])
    assert not holds_numbers(torch.tensor([torch.inf])) and not holds_numbers(torch.tensor([[-torch.inf]]))


def test_a_model_without_a_head_and_a_quantized_one_have_names_of_their_own(tmp_path):
    random_model(num_hidden_layers=1).model.save_pretrained(tmp_path)
    check_saved_weights(tmp_path, [WEIGHTS])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    save_file({"packed": torch.ones(2, dtype=torch.uint8), "scale": torch.ones(2)}, tmp_path / WEIGHTS)
    check_saved_weights(tmp_path, [WEIGHTS])
    save_file({"packed": torch.ones(2, dtype=torch.uint8), "scale": torch.ones(2) * torch.nan}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="NaN or infinities in scale"):
        check_saved_weights(tmp_path, [WEIGHTS])


def test_layers_that_a_configuration_asks_for_and_the_weights_lack_are_not_built(tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 9999}))
    with pytest.raises(ValueError, match=f"it lacks model.layers.1.*and {12 - MOST_NAMES} more"):
        check_saved_weights(tmp_path, [WEIGHTS])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**8}))
    with pytest.raises(ValueError, match="`num_hidden_layers` must be at most 10000, but got 100000000"):
        check_saved_weights(tmp_path, [WEIGHTS])


def test_a_pair_of_an_adapter_must_be_whole_and_fit(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(random_model(num_hidden_layers=1), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    check_saved_weights(tmp_path, [name])
    state = load_file(tmp_path / name)
    pair = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    for changed, message in (
        (without(state, pair.format("B")), rf"lacks {pair.format('B')}"),
        (without(state, pair.format("A")), rf"lacks {pair.format('A')}"),
        (state | {pair.format("A"): torch.ones(3, 32)}, rf"{pair.format('B')} \(32, 2\) for \(32, 3\)"),
        (with_value(state, pair.format("A"), torch.nan), pair.format("A")),
    ):
        save_file(changed, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            check_saved_weights(tmp_path, [name])
