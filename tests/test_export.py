"""
Adapted networks for serving engines, and as the autoregressive model again. The contracts are what the published
sources of SGLang and LMDeploy read of a folder; no engine runs here.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from test_families import IDS, STOCK, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bd3lm_hf import BlockDiffusionConfig, BlockDiffusionForMaskedLM
from bd3lm_hf.cli import main
from bd3lm_hf.hub import export
from bd3lm_hf.hub.export import export_checkpoint


@pytest.fixture(autouse=True)
def small_mask_id(monkeypatch):
    """The engines' mask id within the vocabulary of tiny models."""
    monkeypatch.setattr(export, "SDAR_MASK_TOKEN_ID", 39)


def make_model(network="qwen3", shift_logits=False, mask_token_id=39, clean_attention="block", **fields):
    config_class, more = STOCK[network]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 38}
    config = BlockDiffusionConfig(
        text_config=config_class(**sizes, **more, **fields),
        block_size=4,
        mask_token_id=mask_token_id,
        shift_logits=shift_logits,
        clean_attention=clean_attention,
    )
    torch.manual_seed(0)
    return BlockDiffusionForMaskedLM(config).eval()


# What `SDARForCausalLM` of both engines has for parameters, and which tensors of a file it puts into which.
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
STACKED |= {"up_proj": "gate_up_proj"}


def engine_parameters(config):
    layer = ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "self_attn.q_norm.weight"]
    layer += ["self_attn.k_norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    if config["attention_bias"]:
        layer += ["self_attn.qkv_proj.bias", "self_attn.o_proj.bias"]
    if "num_experts" in config:
        experts = range(config["num_experts"])
        layer += ["mlp.gate.weight"]
        layer += [f"mlp.experts.{i}.{part}.weight" for i in experts for part in ("gate_up_proj", "down_proj")]
    else:
        layer += ["mlp.gate_up_proj.weight", "mlp.down_proj.weight"]
    names = {f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in layer}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    return names if config["tie_word_embeddings"] else names | {"lm_head.weight"}


def engine_name(name):
    return re.sub(r"\b(q_proj|k_proj|v_proj|gate_proj|up_proj)\b", lambda match: STACKED[match[0]], name)


# Fields that the engines read without a default, beside those that they all have.
FIELDS_READ = (
    "attention_bias",
    "block_size",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
    "vocab_size",
)
FIELDS_READ_OF_EXPERTS = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob")
FIELDS_READ_OF_EXPERTS += ("num_experts", "num_experts_per_tok")


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": {"rope_theta": 5e5}}),
        ("qwen3_moe", {}),
    ],
)
def test_the_sdar_folder_has_the_fields_and_tensors_that_engines_read(tmp_path, network, fields):
    model = make_model(network, **fields)
    export_checkpoint(model, tmp_path, "sdar", make_tokenizer("<|MASK|>"))
    config = json.loads((tmp_path / "config.json").read_text())
    read = FIELDS_READ + (FIELDS_READ_OF_EXPERTS if network == "qwen3_moe" else ())
    assert not [name for name in read if name not in config]
    names = ("sdar", "SDARForCausalLM") if network == "qwen3" else ("sdar_moe", "SDARMoeForCausalLM")
    assert (config["model_type"], config["architectures"][0]) == names
    # LMDeploy chooses by the model type, SGLang by the architecture; both have the mask id in their code.
    assert (config["mask_token_id"], config["block_size"], config["torch_dtype"]) == (39, 4, "float32")
    assert config["rope_theta"] == fields.get("rope_parameters", {"rope_theta": 10000.0})["rope_theta"]
    assert config["rope_scaling"] is None and config["sliding_window"] is None and not config["use_sliding_window"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {engine_name(name) for name in tensors} == engine_parameters(config)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == 39
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 38


def test_the_mask_id_is_that_of_the_engines():
    # The fixture of this file puts another in its place.
    source = export.__loader__.get_source(export.__name__)
    assert 'SDAR_MASK_TOKEN, SDAR_MASK_TOKEN_ID = "<|MASK|>", 151669' in source


def test_rotary_scaling_is_written_as_engines_read_it(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
    export_checkpoint(make_model(rope_parameters=scaling), tmp_path, "sdar")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == scaling.pop("rope_theta")
    assert config["rope_scaling"].items() >= scaling.items()


@pytest.mark.parametrize("network", ["qwen3", "qwen3_moe"])
@torch.no_grad()
def test_the_sdar_folder_reads_back_as_the_model(tmp_path, network):
    model = make_model(network)
    export_checkpoint(model, tmp_path, "sdar")
    again = BlockDiffusionForMaskedLM.from_pretrained(tmp_path)
    assert (again.config.block_size, again.config.mask_token_id, again.config.shift_logits) == (4, 39, False)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_engines_can_read_the_configuration_by_the_code_beside_it(tmp_path):
    export_checkpoint(make_model(), tmp_path, "sdar")
    reference = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"]
    config = get_class_from_dynamic_module(reference, str(tmp_path)).from_pretrained(tmp_path)
    assert (type(config).__name__, config.model_type, config.head_dim) == ("SDARConfig", "sdar", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "llama"}, r"takes `text_config` a Qwen3 \(qwen3 or qwen3_moe\), but got 'llama'"),
        ({"network": "qwen2"}, "takes `text_config` a Qwen3 .*, but got 'qwen2'"),
        ({"shift_logits": True}, "takes `shift_logits` False, but got True"),
        ({"shift_logits": "noisy"}, "takes `shift_logits` False, but got 'noisy'"),
        ({"mask_token_id": 38}, "takes `mask_token_id` 39, but got 38"),
        ({"clean_attention": "causal"}, "takes `clean_attention` 'block', but got 'causal'"),
        ({"hidden_act": "gelu"}, "takes `hidden_act` 'silu', but got 'gelu'"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "takes no sliding windows, but got {'sliding_attention': 8}",
        ),
    ],
)
def test_engines_do_not_take_other_networks(tmp_path, arguments, message):
    with pytest.raises(ValueError, match="`model` must be what SGLang .* and LMDeploy .* serve as SDARForCausalLM"):
        export_checkpoint(make_model(**arguments), tmp_path / "out", "sdar")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(make_model(**arguments), tmp_path / "out", "sdar")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("network", STOCK)
@torch.no_grad()
def test_the_causal_lm_folder_is_the_source_again(tmp_path, network):
    model = make_model(network, shift_logits=True)
    model.save_pretrained(tmp_path / "adapted")
    make_tokenizer("<|mask|>").save_pretrained(tmp_path / "adapted")
    export_checkpoint(tmp_path / "adapted", tmp_path / "out", "causal-lm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == network and "auto_map" not in config and "text_config" not in config
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and type(stock).__module__.startswith("transformers.")
    assert stock.generation_config.eos_token_id == 38 and stock.generation_config.top_k in (None, 50)
    model.config.block_size = 1
    torch.testing.assert_close(stock(IDS).logits[:, :-1], model(IDS).logits[:, 1:], rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 38}
    assert stock.generate(IDS, **greedy).tolist() == model.generate(IDS, **greedy).tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_tied_network_with_learned_positions_comes_back_too(tmp_path):
    stock = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=39, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = BlockDiffusionForMaskedLM.from_causal_lm(stock.eval(), block_size=4)
    export_checkpoint(model, tmp_path, "causal-lm")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight and again.config.vocab_size == 40
    for name, tensor in before.items():
        assert torch.equal(again.state_dict()[name][: len(tensor)], tensor), name


def test_a_network_without_shift_is_no_causal_lm(tmp_path):
    with pytest.raises(ValueError, match="`shift_logits` must be true for the format 'causal-lm', .*but got False"):
        export_checkpoint(make_model(), tmp_path / "out", "causal-lm")
    assert not (tmp_path / "out").exists()


def test_export_by_the_command_and_its_mistakes(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "adapted")
    source = str(tmp_path / "adapted")
    assert main(["export", source, str(tmp_path / "out"), "--format", "sdar"]) == 0
    assert "saved to" in capsys.readouterr().out and (tmp_path / "out" / "configuration_sdar.py").exists()
    assert main(["export", source, source, "--format", "sdar"]) == 2
    assert "`destination` must be another folder than `model`" in capsys.readouterr().err
    assert main(["export", source, str(tmp_path / "again"), "--format", "causal-lm"]) == 2
    assert "`shift_logits` must be true" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`format` must be one of sdar, causal-lm, but got 'onnx'"):
        export_checkpoint(source, tmp_path / "again", "onnx")
    with pytest.raises(ValueError, match="`model` must be a BlockDiffusionForMaskedLM, but got a Qwen3ForCausalLM"):
        export_checkpoint(export.to_causal_lm(make_model()), tmp_path / "again", "sdar")
