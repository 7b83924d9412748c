"""`adapt` and `bd3lm adapt`: which token becomes the mask, what stays as it was, and what is refused by name."""

import json
from unittest import mock

import pytest
import torch
from adapted import CHAT_TEMPLATE, adapted_lm, byte_tokenizer, causal_lm, save_causal_lm
from conftest import random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
)

from bd3lm_hf import BlockDiffusionForMaskedLM, adapt, evaluate_likelihood
from bd3lm_hf.cli import main
from bd3lm_hf.hub.adaptation import adapt_checkpoint, set_mask_token
from bd3lm_hf.hub.export import SDAR_MASK_TOKEN_ID


TEXT = "Block by block, and left to right."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_causal_lm(tmp_path_factory.mktemp("source"))


def test_an_adapted_model_of_block_size_1_is_its_source(source):
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    model, _ = adapt(source, block_size=1)
    model.eval()
    ids = torch.tensor([[0, *tokenizer(TEXT)["input_ids"]]])
    with torch.no_grad():
        logits, expected = model(ids).logits[:, 1:, : len(tokenizer)], stock(ids).logits[:, :-1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert written.tolist() == stock.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist()


def test_with_an_unused_token_the_likelihood_is_that_of_the_source_without_it():
    source, rows = causal_lm(), [[0, *range(3, 22), *range(21, 2, -1)]]
    with torch.no_grad():
        # The mask token has no probability in a diffusion model.
        source.lm_head.weight[22] = 0
        log_probs = source(torch.tensor(rows)).logits[0].index_fill(-1, torch.tensor(22), -torch.inf).log_softmax(-1)
    expected = -log_probs[range(38), rows[0][1:]].mean().item()
    model = adapted_lm(block_size=1)
    with torch.no_grad():
        model.lm_head.weight[22] = 0
    assert evaluate_likelihood(model, rows, progress=False).nelbo == pytest.approx(expected, abs=1e-5)


def test_a_token_of_the_source_is_named_as_its_mask_token(tmp_path):
    source = str(save_causal_lm(tmp_path, byte_tokenizer("<unused7>", "<unused8>")))
    model = BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token="<unused8>")
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<unused8>")
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    for arguments in ((source, "<unused9>"), (causal_lm(), "<unused8>"), (source, "<unused8>", 5)):
        given, token, *ids = arguments
        with pytest.raises(ValueError, match="`mask_token` must be a token of a named `model`, but got '<unused"):
            BlockDiffusionForMaskedLM.from_causal_lm(given, mask_token=token, mask_token_id=ids[0] if ids else None)


def test_a_new_mask_token_starts_at_the_mean_of_the_embeddings(source):
    model, tokenizer = adapt(source)
    stock = AutoModelForCausalLM.from_pretrained(source)
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == 259 == model.config.mask_token_id
    for part, stock_part in (
        (model.get_input_embeddings(), stock.get_input_embeddings()),
        (model.get_output_embeddings(), stock.get_output_embeddings()),
    ):
        assert len(part.weight) == 260 == model.config.vocab_size
        torch.testing.assert_close(part.weight[:259], stock_part.weight, rtol=0, atol=0)
        torch.testing.assert_close(part.weight[259], stock_part.weight.mean(0))


@pytest.mark.parametrize(
    ("further_tokens", "declared", "expected"),
    [
        (["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], None, "<|reserved_special_token_0|>"),
        (["<unused7>", "[MASK]"], None, "[MASK]"),
        (["<unused7>"], "<m>", "<m>"),
        (["<|extra_3|>"], None, "<|extra_3|>"),
        (["<|im_end|>"], None, "<|mask|>"),
    ],
)
def test_a_token_that_is_there_becomes_the_mask_and_the_embeddings_stay(further_tokens, declared, expected):
    tokenizer = byte_tokenizer(*further_tokens)
    if declared:
        tokenizer.add_special_tokens({"mask_token": declared})
    num_tokens = len(tokenizer)
    model, adapted_tokenizer = adapt(causal_lm(vocab_size=num_tokens), tokenizer)
    assert adapted_tokenizer.mask_token == expected
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.vocab_size == num_tokens + (expected == "<|mask|>")
    # It is one token, and a special one.
    assert tokenizer(f"a{expected}b", add_special_tokens=False)["input_ids"][1] == tokenizer.mask_token_id
    assert tokenizer.decode([tokenizer.mask_token_id], skip_special_tokens=True) == ""


def test_rows_that_no_token_uses_make_room_for_the_mask_token():
    # As Qwen3 has 151,936 rows for 151,669 tokens.
    tokenizer = byte_tokenizer()
    source = causal_lm(vocab_size=300)
    rows = source.get_input_embeddings().weight.clone()
    model, tokenizer = adapt(source, tokenizer)
    assert tokenizer.mask_token_id == 259 and model.config.vocab_size == 300
    torch.testing.assert_close(model.get_input_embeddings().weight, rows, rtol=0, atol=0)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<pad>", "<|user|>"])
def test_a_token_that_has_a_use_is_no_mask_token(token):
    tokenizer = byte_tokenizer("<|user|>")
    tokenizer.chat_template = "<|user|>{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"`mask_token` must be a token that no text uses, but '.*' is (its|in its)"):
        set_mask_token(tokenizer, token)
    assert tokenizer.mask_token is None


def test_the_command_writes_a_folder_that_everything_reads(source, tmp_path, capsys):
    folder = tmp_path / "adapted"
    options = ["--block_size", "8", "--no_shift_logits", "--clean_attention", "causal", "--mask_token", "<hole>"]
    assert main(["adapt", str(source), str(folder), *options]) == 0
    assert "llama" in (printed := capsys.readouterr().out) and "<hole> (259), logits not shifted" in printed
    config = AutoConfig.from_pretrained(folder)
    assert (config.block_size, config.shift_logits, config.clean_attention) == (8, False, "causal")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<hole>", 259)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    model, again = (auto.from_pretrained(folder) for auto in (AutoModelForMaskedLM, AutoModelForCausalLM))
    assert type(model) is type(again) is BlockDiffusionForMaskedLM
    assert "modeling_causal_lm.py" in {path.name for path in folder.glob("*.py")}
    # No path of this machine.
    assert not hasattr(config, "adapted_from") and str(tmp_path.parent) not in (folder / "config.json").read_text()


def test_a_folder_that_holds_something_is_written_into_only_if_asked(source, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["adapt", str(source), str(tmp_path)]) == 2
    assert "`destination` must be a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert main(["adapt", str(source), str(tmp_path), "--overwrite"]) == 0
    # What would be read along with it is gone.
    assert not (tmp_path / "adapter_config.json").exists()
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.block_size == 4
    assert main(["adapt", str(source), str(source), "--overwrite"]) == 2
    assert "must be another folder than `source`" in capsys.readouterr().err
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
    (tmp_path / "file").write_text("")
    assert main(["adapt", str(source), str(tmp_path / "file")]) == 2
    assert "must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "given", "folder"),
    [("models/smol.gguf", None, "models"), ("smol.gguf", None, "."), ("user/smol", "q4.gguf", "user/smol")],
)
def test_a_gguf_file_is_read_with_its_tokenizer(path, given, folder):
    file = given or "smol.gguf"
    with (
        mock.patch.object(AutoModelForCausalLM, "from_pretrained", return_value=causal_lm(vocab_size=259)) as model,
        mock.patch.object(AutoTokenizer, "from_pretrained", return_value=byte_tokenizer()) as tokenizer,
    ):
        adapt(path, gguf_file=given)
    model.assert_called_once_with(folder, gguf_file=file, quantization_config=mock.ANY)
    # Unpacked: as blocks the weights could be neither trained nor saved.
    assert model.call_args.kwargs["quantization_config"].dequantize
    tokenizer.assert_called_once_with(folder, gguf_file=file)


def large_tokenizer():
    """As many tokens as Qwen3's tokenizer has, without a mask token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(SDAR_MASK_TOKEN_ID - len(tokenizer))])
    return tokenizer


def test_for_sdar_the_values_are_those_of_the_engines():
    sizes = {"vocab_size": 151936, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    tokenizer = large_tokenizer()
    model, tokenizer = adapt(causal_lm("qwen3", **sizes), tokenizer, target="sdar")
    config = model.config
    assert (config.mask_token_id, config.shift_logits, config.vocab_size) == (151669, False, 151936)
    assert tokenizer.mask_token == "<|MASK|>"
    with pytest.raises(ValueError, match="'sdar' takes a network of the type qwen3 or qwen3_moe.* but got 'llama'"):
        adapt(causal_lm(vocab_size=259), byte_tokenizer(), target="sdar")
    with pytest.raises(ValueError, match="has the id 151669, as that of Qwen3 gives it, but here it has 259"):
        adapt(causal_lm("qwen3", vocab_size=259), byte_tokenizer(), target="sdar")
    with pytest.raises(ValueError, match="`shift_logits` must be False for `target` 'sdar', but got True"):
        adapt("any", target="sdar", shift_logits=True)
    with pytest.raises(ValueError, match="`target` must be one of sdar, but got 'vllm'"):
        adapt("any", target="vllm")


def test_what_is_no_autoregressive_model_is_not_adapted():
    for model in (random_model(), adapted_lm()):
        with pytest.raises(ValueError, match="`source` must be an autoregressive model.*denoises blocks already"):
            adapt(model, byte_tokenizer())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertLMHeadModel(BertConfig(vocab_size=259, **sizes))
    with pytest.raises(ValueError, match="BertLMHeadModel, whose scores depend on other tokens than those before"):
        adapt(bert, byte_tokenizer())
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=259, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="but got 'mamba', which"):
        adapt(mamba, byte_tokenizer())
    with pytest.raises(ValueError, match=r"`source` must be loaded here for \['dtype'\], but got a model"):
        adapt(causal_lm(), byte_tokenizer(), dtype="float32")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_source_s_attention_implementation_stays(attention):
    model, _ = adapt(causal_lm(vocab_size=259, attn_implementation=attention), byte_tokenizer())
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == attention


def test_a_source_of_the_hub_is_named_in_the_configuration(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config._name_or_path = "user/smol"
    adapted, _ = adapt(model, byte_tokenizer())
    adapted.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).adapted_from == "user/smol"
    with pytest.raises(ValueError, match="`destination` must be another folder"):
        adapt_checkpoint(source, source)
