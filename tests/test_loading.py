"""Nobody goes on with a model that lacks weights, or has some of another shape or that are no numbers."""

import json
import logging
import shutil

import pytest
import torch
from adapted import adapted_lm
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.core_model_loading import WeightRenaming

from bd3lm_hf import BD3LMForMaskedLM, load_for_evaluation, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.evaluation.loading import check_finite, load_whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tiny model and an autoregressive one, their tokenizer beside each, and a text."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = train_tokenizer({"text": ["def main(path):\n    return\n"] * 9}, 280)
    ids = {"mask_token_id": tokenizer.mask_token_id, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = random_model(vocab_size=len(tokenizer), max_position_embeddings=32, **ids)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0)
    for name, part in (("model", model.to("cpu")), ("judge", GPT2LMHeadModel(config))):
        part.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("def main(path):\n    return\n" * 20)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def change(folder, spoil):
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# What is done to the folder of a model, and what the error names.
SPOILT = {
    "missing": (lambda folder: change(folder, lambda weights: weights.pop("lm_head.bias")), "lacks lm_head.bias"),
    "shape": (
        lambda folder: change(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight of shape [31] for [32]",
    ),
    "nan": (
        lambda folder: change(
            folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan)
        ),
        "NaN or infinity in model.layers.1.mlp.up_proj.weight",
    ),
    "infinity": (
        lambda folder: change(folder, lambda weights: weights["lm_head.bias"].fill_(torch.inf)),
        "NaN or infinity in lm_head.bias",
    ),
    "a_layer_too_many": (lambda folder: configure(folder, num_hidden_layers=3), "lacks model.layers.2.adaln"),
    "a_layer_too_few": (lambda folder: configure(folder, num_hidden_layers=1), "holds model.layers.1.adaln"),
    "narrower": (lambda folder: configure(folder, intermediate_size=64), "up_proj.bias of shape [128] for [64]"),
    "untied": (lambda folder: configure(folder, adaln=False), "holds model.adaln_modulation.bias"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_no_command_goes_on_with_a_model_that_is_not_whole(copy, kind, capsys, monkeypatch):
    spoil, message = SPOILT[kind]
    spoil(copy / "model")
    monkeypatch.setattr(BD3LMForMaskedLM, "forward", lambda *args, **kwargs: pytest.fail("it went on"))
    model, text = str(copy / "model"), str(copy / "text.txt")
    for argv in (
        ["evaluate", model, "--data", text],
        ["generate", model, "def"],
        ["app", model],
        ["app", model, "--space", str(copy / "space")],
        ["plot", "denoising", model, "def"],
        ["quality", text, "--judge", model],
        ["train", "--data", text, "--model", model, "--output_dir", str(copy / "out")],
    ):
        assert main(argv) == 2, argv
        captured = capsys.readouterr()
        assert message in captured.err.splitlines()[-1], argv
        # Neither a figure nor Transformers' table.
        assert "perplexity" not in captured.out and "LOAD REPORT" not in captured.err
    assert not (copy / "space").exists() and not (copy / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "nan", "a_layer_too_few"])
def test_the_harness_refuses_a_model_that_is_not_whole(copy, kind):
    pytest.importorskip("lm_eval")
    from bd3lm_hf.evaluation.harness import BD3LMHarness

    spoil, message = SPOILT[kind]
    spoil(copy / "model")
    with pytest.raises(ValueError, match="`model` must") as error:
        BD3LMHarness(copy / "model")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: change(folder, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias")),
            "lacks transformer.h.1.mlp.c_fc.bias",
        ),
        (
            lambda folder: change(folder, lambda weights: weights["transformer.wpe.weight"].fill_(torch.nan)),
            "NaN or infinity in transformer.wpe.weight",
        ),
        (lambda folder: configure(folder, n_positions=16), "transformer.wpe.weight of shape [32, 32] for [16, 32]"),
        (lambda folder: configure(folder, n_layer=1), "transformer.h.1.attn.c_attn.weight"),
    ],
    ids=["missing", "nan", "shape", "a_layer_too_few"],
)
def test_a_judge_that_is_not_whole_judges_nothing(copy, spoil, message, capsys):
    spoil(copy / "judge")
    for argv in (
        ["quality", str(copy / "text.txt"), "--judge", str(copy / "judge")],
        ["evaluate", str(copy / "judge"), "--data", str(copy / "text.txt")],
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_another_kind_may_be_a_part_of_its_checkpoint(copy):
    change(copy / "judge", lambda weights: weights.update({"vision.layers.0.weight": torch.ones(3)}))
    assert load_whole(AutoModelForCausalLM, copy / "judge").config.n_layer == 2


def test_a_whole_model_is_loaded_as_transformers_does(whole, shared_dir):
    for folder in (whole / "model", shared_dir / "parity" / "bd3lm_block4", shared_dir / "parity" / "mdlm"):
        loaded, expected = load_whole(BD3LMForMaskedLM, folder), BD3LMForMaskedLM.from_pretrained(folder)
        assert not loaded.training and loaded.device.type == "cpu"
        for name, weight in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_bias_may_rule_a_token_out(copy):
    change(copy / "model", lambda weights: weights["lm_head.bias"][5:6].fill_(-torch.inf))
    load_whole(BD3LMForMaskedLM, copy / "model")
    with pytest.raises(ValueError, match="'here' has NaN or infinity in a, c"):
        check_finite(
            [("a", torch.full((2, 2), -torch.inf)), ("b", torch.ones(2).long()), ("c", -torch.tensor([torch.nan]))],
            "here",
        )


def test_an_adapter_needs_a_whole_base_and_all_of_itself(copy, tmp_path):
    peft = pytest.importorskip("peft")
    base, folder = copy / "model", tmp_path / "adapter"
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(BD3LMForMaskedLM.from_pretrained(base), config).save_pretrained(folder)
    load_whole(BD3LMForMaskedLM, folder)
    shutil.copy(base / "tokenizer.json", folder)
    shutil.copy(base / "tokenizer_config.json", folder)
    assert load_for_evaluation(str(folder))[0].peft_config

    adapter = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in adapter if "layers.0.mlp.up_proj.lora_B" in name)
    save_file({key: adapter[key] for key in adapter if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter' lacks model.layers.0.mlp.up_proj.lora_B"):
        load_whole(BD3LMForMaskedLM, folder)
    save_file(adapter, folder / "adapter_model.safetensors")
    change(base, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"copy/model' lacks model.norm.weight"):
        load_whole(BD3LMForMaskedLM, folder)


@pytest.mark.parametrize(
    "parts, tied",
    [
        ({"trainable_token_indices": [5, 22]}, True),
        ({"trainable_token_indices": [5]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_an_adapter_s_rows_and_whole_modules_are_loaded_with_it(tmp_path, monkeypatch, parts, tied):
    peft = pytest.importorskip("peft")
    adapted_lm(overrides={"tie_word_embeddings": tied}).save_pretrained(tmp_path / "base")
    base = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **parts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    input_ids = torch.arange(22)[None]
    logits = model(input_ids).logits
    with model.disable_adapter():
        assert (model(input_ids).logits - logits).abs().max() > 1
    torch.testing.assert_close(load_whole(AutoModelForMaskedLM, tmp_path / "adapter")(input_ids).logits, logits)
    # Transformers 5.17 leaves these names as they are in the file.
    renamed = "transformers.integrations.peft.WeightRenaming"
    monkeypatch.setattr(renamed, lambda *names: WeightRenaming("nothing", "nothing"), raising=False)
    torch.testing.assert_close(load_whole(AutoModelForMaskedLM, tmp_path / "adapter")(input_ids).logits, logits)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = [key for key in weights if "lora" not in key]
    assert lost
    save_file(
        {key: weights[key] for key in weights if key not in lost}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="adapter' lacks"):
        load_whole(AutoModelForMaskedLM, tmp_path / "adapter")


def test_what_is_missing_is_told_before_memory_is_taken_for_it(copy):
    # Sixteen terabytes of weights.
    configure(copy / "model", hidden_size=2**20, intermediate_size=2**22)
    with pytest.raises(ValueError, match="of shape"):
        load_whole(BD3LMForMaskedLM, copy / "model")


def test_loading_leaves_the_logs_of_transformers_as_they_were(whole):
    logger = logging.getLogger("transformers.modeling_utils")
    before = (logger.level, list(logger.filters))
    load_whole(BD3LMForMaskedLM, whole / "model")
    assert (logger.level, logger.filters) == before
