"""Published checkpoints are read as they are, lose nothing on the way, and what is not one of them is refused."""

import argparse
import json
import re

import pytest
import torch
from conftest import random_model, tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMModel
from bd3lm_hf.hub.conversion import (
    SplitQueryKeyValue,
    convert_checkpoint,
    from_published_state_dict,
    to_published_state_dict,
)


PARITY = ("bd3lm_block1", "bd3lm_block4", "bd3lm_block8_no_adaln", "bd3lm_block16_time_conditioned", "mdlm")
VOCAB_SIZE, HIDDEN_SIZE, NUM_HEADS, COND_DIM, LENGTH, BLOCK_SIZE = 23, 32, 2, 16, 64, 4
IDS = torch.arange(2 * 12).reshape(2, 12) % (VOCAB_SIZE - 1)


def published_layer(hidden_size, adaln):
    """The parameters of a published layer, in the order in which the published code registers them."""
    layer = {
        "norm1": nn.LayerNorm(hidden_size, bias=False),
        "attn_qkv": nn.Linear(hidden_size, 3 * hidden_size, bias=False),
        "attn_out": nn.Linear(hidden_size, hidden_size, bias=False),
        "norm2": nn.LayerNorm(hidden_size, bias=False),
        "mlp": nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        ),
    }
    if adaln:
        layer["adaLN_modulation"] = nn.Linear(COND_DIM, 6 * hidden_size)
    return nn.ModuleDict(layer)


class PublishedModel(nn.Module):
    """The parameters and buffers of a published model under their names, in their order; it computes nothing."""

    def __init__(self, vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_layers=2, adaln=True, seed=0):
        super().__init__()
        embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.backbone = nn.ModuleDict({"vocab_embed": nn.ParameterDict({"embedding": embedding})})
        if adaln:
            mlp = nn.Sequential(nn.Linear(256, COND_DIM), nn.SiLU(), nn.Linear(COND_DIM, COND_DIM))
            self.backbone["sigma_map"] = nn.ModuleDict({"mlp": mlp})
        head_dim = hidden_size // NUM_HEADS
        self.backbone["rotary_emb"] = nn.Module()
        self.backbone["rotary_emb"].register_buffer(
            "inv_freq", 1.0 / (10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        )
        self.backbone["blocks"] = nn.ModuleList([published_layer(hidden_size, adaln) for _ in range(num_layers)])
        self.backbone["output_layer"] = nn.ModuleDict(
            {"norm_final": nn.LayerNorm(hidden_size, bias=False), "linear": nn.Linear(hidden_size, vocab_size)}
        )
        if adaln:
            self.backbone["output_layer"]["adaLN_modulation"] = nn.Linear(COND_DIM, 2 * hidden_size)
        self.register_buffer("sampling_eps_min", torch.tensor(1e-3))
        self.register_buffer("sampling_eps_max", torch.tensor(0.999))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def config(self, **overrides):
        """The published `config.json` of this model."""
        vocab_size, hidden_size = self.backbone["vocab_embed"]["embedding"].shape
        return {
            "adaln": "sigma_map" in self.backbone,
            "architectures": ["BD3LM"],
            "attn_backend": "flex",
            "block_size": BLOCK_SIZE,
            "causal": False,
            "cond_dim": COND_DIM,
            "cross_attn": True,
            "dropout": 0.1,
            "hidden_dim": hidden_size,
            "model_length": LENGTH,
            "model_type": "bd3lm",
            "n_blocks": len(self.backbone["blocks"]),
            "n_heads": NUM_HEADS,
            "return_dict": False,
            "sampling_eps_max": 0.999,
            "sampling_eps_min": 0.001,
            "time_conditioning": False,
            "torch_dtype": "float32",
            "var_min": True,
            "vocab_size": vocab_size,
            **overrides,
        }

    def write(self, folder, state_dict=None, **config):
        """Writes the folder that the Hub would have, with `state_dict` in place of the model's if given."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(**config)))
        save_file(state_dict or self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture
def published(tmp_path):
    """A tiny checkpoint in the published format: its folder."""
    return PublishedModel().write(tmp_path / "published")


@pytest.fixture(params=PARITY)
def parity_folder(find_parity_folder, request):
    return find_parity_folder(request.param)


def logits_of(model, ids=IDS):
    """Logits that depend on the values of the weights only: kernels round by where a file's tensors lie in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def assert_same_weights(model, other):
    weights, expected = model.state_dict(), other.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


# The table of names


@pytest.mark.parametrize("adaln", [True, False])
def test_the_table_names_every_parameter_of_both_models_once(adaln):
    published = PublishedModel(adaln=adaln)
    converted = from_published_state_dict(published.state_dict())
    model = BD3LMForMaskedLM(BD3LMConfig(**published.config()))
    assert {name: weight.shape for name, weight in converted.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    fused = published.backbone["blocks"][1]["attn_qkv"].weight
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3)):
        assert torch.equal(converted[f"model.layers.1.self_attn.{name}.weight"], rows), name


@pytest.mark.parametrize("adaln", [True, False])
def test_a_published_state_dict_survives_the_round_trip(adaln):
    published = PublishedModel(adaln=adaln)
    model = BD3LMForMaskedLM(BD3LMConfig(**published.config()))
    model.load_state_dict(from_published_state_dict(published.state_dict()))
    blank = PublishedModel(adaln=adaln, seed=1)
    blank.load_state_dict(to_published_state_dict(model))
    assert_same_weights(blank, published)


def test_a_published_file_comes_back_tensor_for_tensor(parity_folder):
    expected = load_file(parity_folder / "model.safetensors")
    tensors = to_published_state_dict(BD3LMForMaskedLM.from_pretrained(parity_folder))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_fused_projection_that_arrives_in_slices_is_refused_rather_than_split_wrongly():
    split = SplitQueryKeyValue(dim=0)
    names = ["q_proj", "k_proj", "v_proj"]
    fused = torch.randn(3 * HIDDEN_SIZE, HIDDEN_SIZE)
    parts = split.convert({"attn_qkv": [fused]}, ["attn_qkv"], names, config=tiny_config(hidden_size=HIDDEN_SIZE))
    assert torch.equal(torch.cat([parts[name] for name in names]), fused)
    with pytest.raises(ValueError, match=f"3 x `hidden_size` = {3 * HIDDEN_SIZE} rows, but {3 * HIDDEN_SIZE // 2}"):
        split.convert({"attn_qkv": [fused.chunk(2)[0]]}, ["attn_qkv"], names, config=tiny_config())


# Reading


def test_direct_and_converted_loading_give_the_same_model(parity_folder, tmp_path):
    direct = BD3LMForMaskedLM.from_pretrained(parity_folder)
    convert_checkpoint(parity_folder, tmp_path / "converted")
    converted = BD3LMForMaskedLM.from_pretrained(tmp_path / "converted")
    assert direct.config.is_published_format and not converted.config.is_published_format
    assert_same_weights(converted, direct)
    expected = load_file(parity_folder / "expected.safetensors")
    assert torch.equal(logits_of(converted, expected["xt"]), logits_of(direct, expected["xt"]))
    for field in ("block_size", "max_position_embeddings", "noise_interval", "mask_token_id", "time_conditioning"):
        assert getattr(converted.config, field) == getattr(direct.config, field), field


@pytest.mark.parametrize("format", ["one safetensors file", "safetensors shards", "one bin file", "bin shards"])
def test_every_way_of_storing_the_weights_is_read(published, tmp_path, format):
    expected = BD3LMForMaskedLM.from_pretrained(published)
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    suffix, stem, save = "safetensors", "model", save_file
    if "bin" in format:
        suffix, stem, save = "bin", "pytorch_model", torch.save
    if "shards" in format:
        names = sorted(tensors)
        shards = {f"{stem}-0000{i}-of-00003.{suffix}": names[i - 1 :: 3] for i in (1, 2, 3)}
        for file, part in shards.items():
            save({name: tensors[name] for name in part}, published / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (published / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    else:
        save(tensors, published / f"{stem}.{suffix}")
    assert_same_weights(BD3LMForMaskedLM.from_pretrained(published), expected)
    convert_checkpoint(published, tmp_path / "converted")
    assert_same_weights(BD3LMForMaskedLM.from_pretrained(tmp_path / "converted"), expected)


def test_the_model_without_a_head_is_read_from_both_formats(published, tmp_path):
    model = BD3LMForMaskedLM.from_pretrained(published)
    assert_same_weights(BD3LMModel.from_pretrained(published), model.model)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(BD3LMModel.from_pretrained(tmp_path / "saved"), model.model)
    BD3LMModel.from_pretrained(published).save_pretrained(tmp_path / "headless")
    assert_same_weights(BD3LMModel.from_pretrained(tmp_path / "headless"), model.model)


def test_the_auto_classes_read_a_published_folder_even_if_it_names_its_own_code(tmp_path):
    code = {
        "AutoConfig": "somebody/unreachable--configuration.BD3LMConfig",
        "AutoModelForMaskedLM": "somebody/unreachable--modeling_bd3lm.BD3LM",
    }
    published = PublishedModel().write(tmp_path / "published", auto_map=code)
    expected = BD3LMForMaskedLM.from_pretrained(published)
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        assert_same_weights(auto_class.from_pretrained(published), expected)
    assert_same_weights(AutoModel.from_pretrained(published), expected.model)
    assert_same_weights(AutoModelForMaskedLM.from_pretrained(published, trust_remote_code=True), expected)


def test_the_precision_of_the_checkpoint_is_kept(tmp_path):
    published = PublishedModel().bfloat16().write(tmp_path / "published", torch_dtype="bfloat16")
    convert_checkpoint(published, tmp_path / "converted")
    tensors = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_mdlm_configuration_makes_one_block_of_the_whole_length(tmp_path):
    folder = PublishedModel().write(tmp_path / "published", architectures=["MDLM"], model_type="mdlm")
    config = json.loads((folder / "config.json").read_text())
    for younger in ("adaln", "attn_backend", "block_size", "causal", "cross_attn", "var_min"):
        del config[younger]
    (folder / "config.json").write_text(json.dumps(config))
    model = BD3LMForMaskedLM.from_pretrained(folder)
    assert model.config.block_size == model.config.max_position_embeddings == LENGTH
    assert logits_of(model).shape == (*IDS.shape, VOCAB_SIZE)


def test_without_cross_attention_the_whole_length_is_one_block(tmp_path):
    folder = PublishedModel().write(tmp_path / "published", cross_attn=False, block_size=BLOCK_SIZE)
    assert BD3LMForMaskedLM.from_pretrained(folder).config.block_size == LENGTH


def test_a_causal_model_is_refused(tmp_path):
    folder = PublishedModel().write(tmp_path / "published", causal=True)
    with pytest.raises(ValueError, match="`causal`.*autoregressive"):
        BD3LMForMaskedLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`causal`.*autoregressive"):
        convert_checkpoint(folder, tmp_path / "converted")


def test_the_noise_interval_is_that_of_the_configuration_unless_the_caller_sets_one(tmp_path):
    folder = PublishedModel().write(tmp_path / "published", sampling_eps_min=0.45, sampling_eps_max=0.95)
    assert tuple(BD3LMForMaskedLM.from_pretrained(folder).config.noise_interval) == (0.45, 0.95)
    chosen = BD3LMForMaskedLM.from_pretrained(folder, noise_interval=(0.2, 0.7))
    assert tuple(chosen.config.noise_interval) == (0.2, 0.7)
    convert_checkpoint(folder, tmp_path / "converted")
    assert tuple(BD3LMForMaskedLM.from_pretrained(tmp_path / "converted").config.noise_interval) == (0.45, 0.95)


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("backbone.blocks.1.attn_qkv.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("backbone.output_layer.linear.bias", "lm_head.bias"),
        ("backbone.sigma_map.mlp.0.bias", "model.noise_embedding.linear_1.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, here):
    published = PublishedModel()
    tensors = published.state_dict()
    del tensors[name]
    with pytest.raises(ValueError, match=re.escape(name)):
        from_published_state_dict(tensors)
    folder = published.write(tmp_path / "published", tensors)
    with pytest.raises(ValueError, match=re.escape(here)):
        convert_checkpoint(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["backbone.blocks.0.attn_qkv.bias", "backbone.blocks.1.norm3.weight", "noise.rate"])
def test_a_surplus_tensor_is_named(tmp_path, name):
    published = PublishedModel()
    tensors = {**published.state_dict(), name: torch.ones(HIDDEN_SIZE)}
    with pytest.raises(ValueError, match=re.escape(name)):
        from_published_state_dict(tensors)
    folder = published.write(tmp_path / "published", tensors)
    for cls in (BD3LMForMaskedLM, BD3LMModel):
        with pytest.raises(ValueError, match=re.escape(name)):
            cls.from_pretrained(folder)


def test_a_truncated_file_is_the_error_of_its_library(published, tmp_path):
    content = (published / "model.safetensors").read_bytes()
    (published / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SafetensorError):
        convert_checkpoint(published, tmp_path / "converted")


# Writing


def test_a_published_checkpoint_is_saved_in_this_format(published, tmp_path):
    model = BD3LMForMaskedLM.from_pretrained(published)
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == model.state_dict().keys()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["hidden_size"] == HIDDEN_SIZE and config["architectures"] == ["BD3LMForMaskedLM"]
    assert not {"hidden_dim", "n_blocks", "sampling_eps_min", "cross_attn"} & config.keys()
    reloaded = BD3LMForMaskedLM.from_pretrained(tmp_path / "saved")
    assert not reloaded.config.is_published_format
    assert_same_weights(reloaded, model)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_this_format_is_read_and_written_as_if_there_were_no_other(tmp_path, max_shard_size):
    model = random_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "20KB")
    assert set().union(*map(load_file, files)) == model.state_dict().keys()
    reloaded, info = BD3LMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(reloaded, model)


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"])
def test_lora_adapters_are_saved_and_loaded_on_both_formats(published, tmp_path, target_modules):
    peft = pytest.importorskip("peft")
    BD3LMForMaskedLM.from_pretrained(published).save_pretrained(tmp_path / "saved")
    for base in (published, tmp_path / "saved"):
        plain = BD3LMForMaskedLM.from_pretrained(base)
        expected = logits_of(plain)
        config = peft.LoraConfig(target_modules=target_modules, r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(plain, config)
        adapted.save_pretrained(tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
        assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in names
        assert not torch.equal(logits_of(adapted), expected)
        reloaded = peft.PeftModel.from_pretrained(BD3LMForMaskedLM.from_pretrained(base), tmp_path / "adapter")
        assert torch.equal(logits_of(reloaded), logits_of(adapted))
        injected = BD3LMForMaskedLM.from_pretrained(base)
        injected.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits_of(injected), logits_of(adapted))
        reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = BD3LMForMaskedLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=0, atol=1e-4)


def test_conversion_writes_everything_that_loads_without_this_package(published, tmp_path):
    convert_checkpoint(published, tmp_path / "converted")
    auto_map = json.loads((tmp_path / "converted" / "config.json").read_text())["auto_map"]
    sources = {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    for name in ("model.safetensors", "generation_config.json", "modeling_bd3lm.py", *sources):
        assert (tmp_path / "converted" / name).is_file(), name


def test_only_a_published_checkpoint_is_converted(published, tmp_path):
    convert_checkpoint(published, tmp_path / "converted")
    with pytest.raises(ValueError, match="`source` must be in the published format"):
        convert_checkpoint(tmp_path / "converted", tmp_path / "again")
    with pytest.raises(ValueError, match="`source` must be a folder, a repository id or a file"):
        convert_checkpoint(published / "model.safetensors", tmp_path / "again")
    with pytest.raises(ValueError, match="`destination` must be another folder"):
        convert_checkpoint(published, published)
    with pytest.raises(ValueError, match="'block_size': 8"):
        convert_checkpoint(published, tmp_path / "again", block_size=8)
    assert not (tmp_path / "again").exists()


# Checkpoints of the training code


def hyper_parameters(**overrides):
    """What the training code records of such a run, as plain dictionaries."""
    config = {
        "algo": {"parameterization": "subs", "time_conditioning": False, "cross_attn": True, "ignore_bos": True},
        "block_size": BLOCK_SIZE,
        "model": {"length": LENGTH, "n_heads": NUM_HEADS, "dropout": 0.0, "tie_word_embeddings": True},
        "noise": {"type": "loglinear"},
        "training": {"sampling_eps_min": 0.001, "sampling_eps_max": 1.0},
    }
    return {"config": {**config, **overrides}}


def write_ckpt(folder, **entries):
    """A `.ckpt` whose moving averages are another model's weights: (path, the last step's model, the averages')."""
    last_step, averages = PublishedModel(seed=0), PublishedModel(seed=1)
    shadow = [parameter.detach() for parameter in averages.backbone.parameters()]
    checkpoint = {
        "state_dict": last_step.state_dict(),
        "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": shadow},
        "hyper_parameters": hyper_parameters(),
        "global_step": 10,
        **entries,
    }
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, folder / "last.ckpt")
    return folder / "last.ckpt", last_step, averages


def assert_has_weights_of(folder, published):
    """Parameter by parameter, after another way through the table than the one under test."""
    tensors = to_published_state_dict(BD3LMForMaskedLM.from_pretrained(folder))
    for name, parameter in published.named_parameters():
        assert torch.equal(tensors[name], parameter), name


def test_moving_averages_are_taken_unless_refused(tmp_path):
    path, last_step, averages = write_ckpt(tmp_path)
    convert_checkpoint(path, tmp_path / "averages")
    assert_has_weights_of(tmp_path / "averages", averages)
    convert_checkpoint(path, tmp_path / "last_step", use_ema=False)
    assert_has_weights_of(tmp_path / "last_step", last_step)


def test_a_training_checkpoint_computes_what_the_published_folder_computes(parity_folder, tmp_path):
    tensors = load_file(parity_folder / "model.safetensors")
    config = json.loads((parity_folder / "config.json").read_text())
    recorded = hyper_parameters(
        algo={"cross_attn": config["cross_attn"], "time_conditioning": config["time_conditioning"]},
        block_size=config["block_size"],
        model={"length": config["model_length"], "dropout": config["dropout"], "cond_dim": config["cond_dim"]},
    )
    torch.save({"state_dict": tensors, "hyper_parameters": recorded}, tmp_path / "last.ckpt")
    convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "converted", use_ema=False)
    converted = BD3LMForMaskedLM.from_pretrained(tmp_path / "converted")
    direct = BD3LMForMaskedLM.from_pretrained(parity_folder)
    ids = load_file(parity_folder / "expected.safetensors")["xt"]
    assert torch.equal(logits_of(converted, ids), logits_of(direct, ids))
    ours, theirs = converted.config.to_dict(), direct.config.to_dict()
    saved_alone = ("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype")
    for fields in (ours, theirs):
        fields.update(dict.fromkeys(saved_alone, None))
    assert ours == theirs


def test_traces_of_training_are_left_behind(tmp_path):
    state_dict = PublishedModel().state_dict()
    wrapped = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state_dict.items()}
    metrics = {"metrics.valid_nlls.nll.mean_value": torch.zeros(()), "noise.sigma_max": torch.ones(())}
    path, last_step, averages = write_ckpt(tmp_path, state_dict={**wrapped, **metrics})
    convert_checkpoint(path, tmp_path / "converted")
    assert_has_weights_of(tmp_path / "converted", averages)


def test_a_run_that_began_from_the_hub_is_read(tmp_path):
    state_dict = PublishedModel().state_dict()
    interval = {"sampling_eps_min": torch.tensor(0.3), "sampling_eps_max": torch.tensor(0.8)}
    nested = {f"backbone.{name}": tensor for name, tensor in state_dict.items()}
    path, last_step, averages = write_ckpt(tmp_path, state_dict={**interval, **nested})
    model = convert_checkpoint(path, tmp_path / "converted")
    assert_has_weights_of(tmp_path / "converted", averages)
    assert tuple(model.config.noise_interval) == (0.3, 0.8)


def test_masked_diffusion_runs_have_one_block(tmp_path):
    algorithm = {"parameterization": "subs", "cross_attn": False, "ignore_bos": False}
    path, *_ = write_ckpt(tmp_path, hyper_parameters=hyper_parameters(algo=algorithm))
    config = convert_checkpoint(path, tmp_path / "converted", block_size=LENGTH).config
    assert config.block_size == config.max_position_embeddings == LENGTH
    assert config.ignore_bos is False


def test_what_the_tensors_do_not_say_is_asked_for(tmp_path):
    path, *_ = write_ckpt(tmp_path, hyper_parameters=None)
    with pytest.raises(ValueError, match="give `max_position_embeddings`"):
        convert_checkpoint(path, tmp_path / "converted", block_size=8)
    with pytest.raises(ValueError, match="give `block_size`"):
        convert_checkpoint(path, tmp_path / "converted", max_position_embeddings=32)
    config = convert_checkpoint(path, tmp_path / "converted", block_size=8, max_position_embeddings=32).config
    assert (config.block_size, config.max_position_embeddings) == (8, 32)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (23, 32, 128)
    assert (config.num_hidden_layers, config.num_attention_heads, config.cond_dim) == (2, 2, 16)

    state_dict = PublishedModel().state_dict()
    del state_dict["backbone.rotary_emb.inv_freq"]
    path, *_ = write_ckpt(tmp_path, state_dict=state_dict, hyper_parameters=None)
    with pytest.raises(ValueError, match="give `num_attention_heads`"):
        convert_checkpoint(path, tmp_path / "other", block_size=8, max_position_embeddings=32)


def test_an_option_cannot_contradict_the_checkpoint(tmp_path):
    path, *_ = write_ckpt(tmp_path)
    with pytest.raises(ValueError, match=f"`block_size` must be that of `source`, {BLOCK_SIZE}, but got 8"):
        convert_checkpoint(path, tmp_path / "converted", block_size=8)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path, *_ = write_ckpt(tmp_path, hyper_parameters=hyper_parameters(algo={"parameterization": "ar"}))
    with pytest.raises(ValueError, match="'ar'"):
        convert_checkpoint(path, tmp_path / "converted")
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="has no `state_dict`"):
        convert_checkpoint(path, tmp_path / "converted")


def test_objects_that_run_code_are_refused_by_name(tmp_path):
    path, *_ = write_ckpt(tmp_path, hyper_parameters={"config": argparse.Namespace(block_size=4)})
    with pytest.raises(ValueError, match=r"weights_only=True.*argparse\.Namespace"):
        convert_checkpoint(path, tmp_path / "converted")


def test_missing_and_surplus_tensors_of_a_training_checkpoint_are_named(tmp_path):
    state_dict = PublishedModel().state_dict()
    state_dict["critic.weight"] = state_dict.pop("backbone.blocks.0.attn_out.weight")
    path, *_ = write_ckpt(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"backbone\.blocks\.0\.attn_out\.weight.*critic\.weight"):
        convert_checkpoint(path, tmp_path / "converted")


def test_moving_averages_that_do_not_fit_are_refused(tmp_path):
    shadow = [parameter.detach() for parameter in PublishedModel(seed=1).backbone.parameters()]
    swapped = [shadow[1], shadow[0], *shadow[2:]]
    reordered = dict(sorted(PublishedModel().state_dict().items()))
    path, *_ = write_ckpt(tmp_path, ema={"shadow_params": shadow[:-1]})
    with pytest.raises(ValueError, match=f"{len(shadow)} parameters, but it holds {len(shadow) - 1}"):
        convert_checkpoint(path, tmp_path / "converted")
    path, *_ = write_ckpt(tmp_path, ema={"shadow_params": swapped})
    with pytest.raises(ValueError, match=r"for backbone\.vocab_embed\.embedding of shape \(23, 32\) it holds one of"):
        convert_checkpoint(path, tmp_path / "converted")
    path, *_ = write_ckpt(tmp_path, state_dict=reordered)
    with pytest.raises(ValueError, match="order of the published code's parameters"):
        convert_checkpoint(path, tmp_path / "converted")
    path, *_ = write_ckpt(tmp_path, ema=None)
    with pytest.raises(ValueError, match="has none.*--no-ema"):
        convert_checkpoint(path, tmp_path / "converted")


# Tokenizers


def word_tokenizer(num_tokens, mask_token=None):
    words = ["</s>", *(f"w{i}" for i in range(1, num_tokens))]
    if mask_token is not None:
        words[3] = mask_token
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", mask_token=mask_token)


def test_the_tokenizer_is_saved_with_the_mask_token_as_the_last_one(published, tmp_path):
    given = word_tokenizer(VOCAB_SIZE - 1)
    given.save_pretrained(tmp_path / "tokenizer")
    for number, tokenizer in enumerate((given, tmp_path / "tokenizer", str(tmp_path / "tokenizer"))):
        destination = tmp_path / f"converted{number}"
        convert_checkpoint(published, destination, tokenizer=tokenizer)
        saved = AutoTokenizer.from_pretrained(destination)
        model = BD3LMForMaskedLM.from_pretrained(destination)
        assert len(saved) == model.config.vocab_size == VOCAB_SIZE
        assert saved.mask_token_id == model.config.mask_token_id == VOCAB_SIZE - 1
        assert model.config.eos_token_id == model.generation_config.eos_token_id == saved.eos_token_id == 0
    assert given.mask_token is None


def test_a_tokenizer_of_another_size_is_refused_before_anything_is_written(published, tmp_path):
    with pytest.raises(ValueError, match=f"as many tokens as the model, {VOCAB_SIZE}, but it has {VOCAB_SIZE - 1}"):
        convert_checkpoint(published, tmp_path / "converted", tokenizer=word_tokenizer(VOCAB_SIZE - 2))
    assert not (tmp_path / "converted").exists()


def test_a_mask_token_that_is_not_the_last_one_must_be_the_models(published, tmp_path):
    tokenizer = word_tokenizer(VOCAB_SIZE, mask_token="[MASK]")
    with pytest.raises(ValueError, match=rf"`mask_token_id` {VOCAB_SIZE - 1}, but '\[MASK\]' is 3"):
        convert_checkpoint(published, tmp_path / "converted", tokenizer=tokenizer)
    convert_checkpoint(published, tmp_path / "converted", tokenizer=tokenizer, mask_token_id=3)
    assert BD3LMForMaskedLM.from_pretrained(tmp_path / "converted").config.mask_token_id == 3
    with pytest.raises(
        ValueError, match=f"`mask_token_id` must be an id 0 <= id < {VOCAB_SIZE}, but got {VOCAB_SIZE}"
    ):
        convert_checkpoint(published, tmp_path / "other", mask_token_id=VOCAB_SIZE)


def test_the_gpt2_tokenizer_of_the_published_models_gets_the_last_id_for_its_mask_token(shared_dir, tmp_path):
    folder = PublishedModel(vocab_size=50258, hidden_size=8, num_layers=1).write(tmp_path / "published")
    convert_checkpoint(folder, tmp_path / "converted", tokenizer=shared_dir / "tokenizers" / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert (len(tokenizer), tokenizer.mask_token_id) == (50258, 50257)
    assert tokenizer.decode(tokenizer("Block diffusion")["input_ids"]) == "Block diffusion"
