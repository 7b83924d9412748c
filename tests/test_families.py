"""Published families of adapted networks: which folders load, what is asked for, what is refused, conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bd3lm_hf import BlockDiffusionConfig, BlockDiffusionForMaskedLM, BlockDiffusionModel, convert_checkpoint
from bd3lm_hf.cli import main
from bd3lm_hf.hub.families import FAMILIES, REFUSED


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 38,
    "bos_token_id": None,
    "pad_token_id": None,
}
STOCK = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "llama": (LlamaConfig, {}),
}
MASK_TOKENS = {"Fast_dLLM_Qwen": "|<MASK>|", "sdar": "<|MASK|>", "sdar_moe": "<|MASK|>"}


def family_fields(model_type, **fields):
    """What the `config.json` of a family adds to that of the stock network."""
    own = {"Fast_dLLM_Qwen": {"bd_size": 4}, "sdar": {"block_size": 4}, "sdar_moe": {"block_size": 4}}
    return {"model_type": model_type, **own.get(model_type, {}), **fields}


def write_family(folder, model_type="sdar", mask_token_id=39, network=None, tokenizer=None, **fields):
    """A folder as the family publishes it, without fields that are None; returns the stock model of its weights."""
    config_class, more = STOCK[network or FAMILIES[model_type].network]
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config_class(**SIZES, **more)).eval()
    stock.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= family_fields(model_type, mask_token_id=mask_token_id, **fields)
    # As older versions of Transformers write it.
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return stock


def make_tokenizer(mask_token, declares_it=True):
    """A tokenizer of 40 tokens, whose last is the mask token; it may be no more than an added token."""
    words = {f"w{index}": index for index in range(37)} | {"[UNK]": 37, "<end>": 38}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="[UNK]")
    if mask_token is None:
        return fast
    if declares_it:
        fast.add_special_tokens({"mask_token": mask_token})
    else:
        fast.add_tokens([mask_token], special_tokens=True)
    fast.chat_template = "{{ messages[0]['content'] }}"
    return fast


IDS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))


def block_causal_logits(stock, ids, size):
    """What the stock network says under a mask by which a token sees its block and those before."""
    block = torch.arange(ids.shape[1]) // size
    mask = (block[None] <= block[:, None])[None, None].expand(len(ids), -1, -1, -1)
    return stock(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_folder_of_each_family_loads_by_every_class_as_the_stock_network(tmp_path, model_type):
    stock = write_family(tmp_path, model_type)
    given = {} if model_type in MASK_TOKENS else {"block_size": 4}
    for auto_class in (BlockDiffusionForMaskedLM, AutoModelForMaskedLM, AutoModelForCausalLM):
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True, **given)
        assert type(model) is BlockDiffusionForMaskedLM and not any(report.values())
        assert model.config.text_config.model_type == FAMILIES[model_type].network
        assert (model.config.block_size, model.config.mask_token_id) == (4, 39)
        assert model.config.shift_logits == FAMILIES[model_type].shift_logits
        assert model.config.ignore_bos == bool(model.config.shift_logits)
        logits, expected = model(input_ids=IDS).logits, block_causal_logits(stock, IDS, 4)
        if model.config.shift_logits:
            logits, expected = logits[:, 1:], expected[:, :-1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for auto_class in (BlockDiffusionModel, AutoModel):
        model = auto_class.from_pretrained(tmp_path, **given)
        assert type(model) is BlockDiffusionModel
        states = model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(stock.lm_head(states), block_causal_logits(stock, IDS, 4), rtol=0, atol=1e-5)


def test_remote_code_beside_the_weights_is_not_asked_for(tmp_path):
    write_family(
        tmp_path, auto_map={"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"}
    )
    for trust in (None, False, True):
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(config) is BlockDiffusionConfig and not hasattr(config.text_config, "auto_map")


@torch.no_grad()
def test_fields_of_training_code_and_sliding_windows_change_nothing(tmp_path):
    own = {"attn_implementation": "flex_attention", "fuse_cross_entropy": True, "debug": False, "use_cache": False}
    windows = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}
    stock = write_family(tmp_path, **own, **windows, layer_types=["sliding_attention"] * 2)
    model = BlockDiffusionForMaskedLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation != "flex_attention"
    assert model.config.sliding_windows == {"full_attention": None}
    torch.testing.assert_close(model(input_ids=IDS).logits, block_causal_logits(stock, IDS, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["sdar", "Fast_dLLM_Qwen", "a2d-llama"])
@pytest.mark.parametrize("declares_it", [True, False])
def test_the_mask_token_comes_from_the_tokenizer_beside_the_weights(tmp_path, model_type, declares_it):
    tokenizer = make_tokenizer(MASK_TOKENS.get(model_type, "<|mask|>"), declares_it)
    write_family(tmp_path, model_type, mask_token_id=None, tokenizer=tokenizer)
    given = {} if model_type in MASK_TOKENS else {"block_size": 8}
    for auto_class in (BlockDiffusionForMaskedLM, AutoModelForMaskedLM):
        assert auto_class.from_pretrained(tmp_path, **given).config.mask_token_id == 39


def test_arguments_come_before_the_tokenizer_and_the_configuration(tmp_path):
    write_family(tmp_path, mask_token_id=30, tokenizer=make_tokenizer("<|MASK|>"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.mask_token_id == 30
    config = BlockDiffusionForMaskedLM.from_pretrained(tmp_path, mask_token_id=7, shift_logits=True).config
    assert (config.mask_token_id, config.shift_logits, config.ignore_bos) == (7, True, True)


def test_fast_dllm_has_a_mask_id_in_its_code(tmp_path):
    config = json.dumps(family_fields("Fast_dLLM_Qwen", vocab_size=151936, hidden_size=64))
    (tmp_path / "config.json").write_text(config)
    assert AutoConfig.from_pretrained(tmp_path).mask_token_id == 151665


@pytest.mark.parametrize(
    ("model_type", "fields", "given", "message"),
    [
        ("sdar", {"block_size": None}, {}, "`block_size` must be given .* SDAR and TraDo, .*`block_size`.* take 4"),
        ("a2d-qwen3", {}, {}, "`block_size` must be given .* dLLM A2D and OPDLM, .* take 32"),
        ("Fast_dLLM_Qwen", {"bd_size": None}, {}, "`block_size` must be given .* Fast-dLLM v2, .*`bd_size`"),
        ("sdar", {"mask_token_id": None}, {}, r"`mask_token_id` must be given .* SDAR and TraDo.*<\|MASK\|>"),
        ("a2d-llama", {"mask_token_id": None}, {"block_size": 4}, r"`mask_token_id` must be given .*<\|mask\|>"),
        ("Fast_dLLM_Qwen", {"mask_token_id": None}, {}, r"`mask_token_id` must be given .*\|<MASK>\|"),
        ("sdar", {}, {"block_size": 8}, "`block_size` must be 4, which this checkpoint was trained for, but got 8"),
        ("sdar", {}, {"mask_token_id": 40}, "`mask_token_id` must be an id inside the vocabulary, .*but got 40"),
    ],
)
def test_what_can_not_be_known_is_asked_for_by_name(tmp_path, model_type, fields, given, message):
    write_family(tmp_path, model_type, **fields)
    for auto_class in (BlockDiffusionForMaskedLM, AutoModelForMaskedLM):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(tmp_path, **given)


@torch.no_grad()
def test_efficient_dlm_is_told_from_qwen3_by_its_own_class(tmp_path):
    with pytest.raises(
        ValueError, match="'qwen3', which is another model; .*`BlockDiffusionForMaskedLM.from_causal_lm`"
    ):
        write_family(tmp_path, "qwen3", network="qwen3")
        BlockDiffusionForMaskedLM.from_pretrained(tmp_path, block_size=4)
    auto_map = {"AutoConfig": "configuration_edlm.EfficientDLMConfig", "AutoModel": "modeling_edlm.EfficientDLM"}
    stock = write_family(tmp_path, "qwen3", network="qwen3", auto_map=auto_map)
    with pytest.raises(ValueError, match="`block_size` must be given .* Efficient-DLM, .* take 64 in training and 32"):
        BlockDiffusionForMaskedLM.from_pretrained(tmp_path)
    model = BlockDiffusionForMaskedLM.from_pretrained(tmp_path, block_size=4)
    assert model.config.shift_logits is False
    torch.testing.assert_close(model(input_ids=IDS).logits, block_causal_logits(stock, IDS, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llada2_moe", "'llada2_moe', which has a network of its own, .*; use its own code, or SGLang"),
        ("nemotron_labs_diffusion", "which has a network of its own, .*; use its own code with `trust_remote_code"),
        (
            "nemotron_labs_diffusion_vlm",
            "which has a network of its own, .*; use its own code with `trust_remote_code",
        ),
        ("Dream", "'Dream', which has a network of its own, .*adapt Qwen2.5 with `from_causal_lm`"),
        ("llada", "'llada', which has a network of its own, .*adapt Llama with `from_causal_lm`"),
        ("diffusion_gemma", "which is native to Transformers; use its `DiffusionGemmaForBlockDiffusion`"),
        ("gpt2", "'gpt2', which is another model; an autoregressive one is adapted with"),
    ],
)
def test_other_networks_are_refused_with_advice(tmp_path, model_type, message, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    for read in (BlockDiffusionForMaskedLM.from_pretrained, BlockDiffusionConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(source)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert message.split(",")[0].split(";")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_refused_family_has_a_test_of_its_message():
    tested = next(mark for mark in test_other_networks_are_refused_with_advice.pytestmark)
    assert {model_type for model_type, _ in tested.args[1]} >= REFUSED.keys()


def test_without_the_package_another_format_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(BlockDiffusionConfig, "read_other_format", None)
    write_family(tmp_path)
    with pytest.raises(
        ValueError, match="`model_type` in config.json must be 'block_diffusion', but got 'sdar'.*bd3lm-hf"
    ):
        BlockDiffusionForMaskedLM.from_pretrained(tmp_path)


# Conversion


PRESETS = {
    "sdar": {"sampler": "confidence", "confidence_threshold": 0.85, "tokens_per_step": 1, "do_sample": True},
    "Fast_dLLM_Qwen": {"confidence_threshold": 0.9, "sub_block_size": 8, "do_sample": False},
    "a2d-qwen3": {"sampler": "confidence", "new_block": True, "do_sample": False},
}


@pytest.mark.parametrize("model_type", PRESETS)
@torch.no_grad()
def test_conversion_writes_this_package_s_format_with_the_family_s_decoding(tmp_path, model_type):
    tokenizer = make_tokenizer(MASK_TOKENS.get(model_type, "<|mask|>"), declares_it=False)
    write_family(tmp_path / "source", model_type, mask_token_id=None, tokenizer=tokenizer)
    # Of the autoregressive model that the network was, and not of its own decoding.
    (tmp_path / "source" / "generation_config.json").write_text(
        '{"eos_token_id": [38, 36], "top_p": 0.8, "do_sample": true}'
    )
    given = {} if model_type in MASK_TOKENS else {"block_size": 4}
    convert_checkpoint(tmp_path / "source", tmp_path / "out", **given)
    direct = BlockDiffusionForMaskedLM.from_pretrained(tmp_path / "source", **given)
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert converted.config.model_type == "block_diffusion" and "AutoModelForMaskedLM" in converted.config.auto_map
    assert torch.equal(converted(input_ids=IDS).logits, direct(input_ids=IDS).logits)
    for name, value in PRESETS[model_type].items():
        assert getattr(converted.generation_config, name) == value
    assert converted.generation_config.eos_token_id == [38, 36]
    assert converted.generation_config.top_p in (None, 1.0)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.mask_token_id == 39 and saved.chat_template == tokenizer.chat_template
    ids = converted.generate(IDS[:1], max_new_tokens=6, pad_token_id=38)
    assert ids.shape[1] <= 15 and not (ids == 39).any()


def test_conversion_without_a_tokenizer_writes_none_and_takes_one(tmp_path):
    write_family(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    convert_checkpoint(tmp_path / "source", tmp_path / "both", make_tokenizer("<|MASK|>", declares_it=False))
    assert AutoTokenizer.from_pretrained(tmp_path / "both").mask_token == "<|MASK|>"


def test_conversion_does_not_leave_out_a_tokenizer_that_it_can_not_load(tmp_path):
    write_family(tmp_path / "source")
    own_code = {"auto_map": {"AutoTokenizer": ["tokenization_sdar.SDARTokenizer", None]}}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(own_code))
    with pytest.raises(ValueError, match="`tokenizer` must be one, .* which it loads without code of its own"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_checkpoint(tmp_path / "source", tmp_path / "out", make_tokenizer("<|MASK|>"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == 39


def test_conversion_by_the_command(tmp_path, capsys):
    write_family(tmp_path / "source", "a2d-qwen2")
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "out")]
    assert main(command) == 2 and "`block_size` must be given" in capsys.readouterr().err
    assert main([*command, "--block_size=4", "--shift_logits=true"]) == 0
    config = BlockDiffusionConfig.from_pretrained(tmp_path / "out")
    assert (config.block_size, config.shift_logits, config.mask_token_id) == (4, True, 39)


def test_conversion_refuses_weights_of_another_network(tmp_path):
    write_family(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`source` must hold the weights of the network 'qwen3' .*model.norm.weight"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversion_refuses_what_does_not_fit(tmp_path):
    write_family(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    with pytest.raises(
        ValueError, match="`source` must be a published checkpoint, but .* this package's format already"
    ):
        convert_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(
        ValueError, match="`num_attention_heads` must be None for a family of adapted networks, but got 4"
    ):
        convert_checkpoint(tmp_path / "source", tmp_path / "again", num_attention_heads=4)
    with pytest.raises(ValueError, match="`tokenizer` must have a token of the model's `mask_token_id` 39"):
        convert_checkpoint(tmp_path / "source", tmp_path / "again", make_tokenizer(None))
    assert not (tmp_path / "again").exists()
