"""What is made for block diffusion models takes a network of Transformers as it takes the published one."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapted import adapted_lm, byte_tokenizer, causal_lm, save_causal_lm
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig, pipeline

from bd3lm_hf import (
    BD3LMTrainer,
    BD3LMTrainingArguments,
    BlockDiffusionForMaskedLM,
    adapt,
    evaluate_likelihood,
    generative_perplexity,
    load_for_evaluation,
    load_tokenizer,
    prepare_finetuning,
)
from bd3lm_hf.app.likelihood import likelihood_of_new_tokens
from bd3lm_hf.cli import main
from bd3lm_hf.data.finetuning import pack_examples
from bd3lm_hf.evaluation.harness import BD3LMHarness
from bd3lm_hf.evaluation.networks import is_block_diffusion, language_model_class
from bd3lm_hf.hub.adaptation import adapt_checkpoint
from bd3lm_hf.hub.publishing import prepare_files
from bd3lm_hf.hub.training_summary import SUMMARY_FILE, TrainingSummary
from bd3lm_hf.training.checkpoints import check_architecture


TEXTS = [f"Text number {number} of a few." for number in range(400)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_causal_lm(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """An adapted folder, as `bd3lm adapt` writes it."""
    folder = tmp_path_factory.mktemp("adapted")
    assert main(["adapt", str(source), str(folder), "--overwrite", "--clean_attention", "causal"]) == 0
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(scope="module")
def trained(folder, text_file, tmp_path_factory):
    """What `bd3lm train --model` makes of it, with a checkpoint after each step."""
    output_dir = tmp_path_factory.mktemp("trained")
    command = ["train", "--data", text_file, "--model", folder, "--length", 32, "--max_steps", 2, "--save_steps", 1]
    command += [
        "--report_to",
        "none",
        "--output_dir",
        output_dir,
        "--max_eval_sequences",
        16,
        "--per_device_train_batch_size",
        4,
    ]
    assert main([str(word) for word in command]) == 0
    return output_dir


def rows(number=3, length=19):
    return [[0, *row] for row in np.random.default_rng(0).integers(3, 22, size=(number, length)).tolist()]


def test_a_checkpoint_says_which_class_loads_it(source, folder, tmp_path):
    assert language_model_class(folder) is BlockDiffusionForMaskedLM
    model = get_peft_model(
        BlockDiffusionForMaskedLM.from_pretrained(folder),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    assert language_model_class(tmp_path) is BlockDiffusionForMaskedLM
    with pytest.raises(ValueError, match="is a 'llama', which `bd3lm adapt` makes one of"):
        language_model_class(source)
    assert not is_block_diffusion(causal_lm().config)


@pytest.mark.parametrize("shift_logits", [True, False])
def test_all_estimators_agree(shift_logits):
    model = adapted_lm(block_size=3, shift_logits=shift_logits)
    exact = evaluate_likelihood(model, rows(), estimator="exact", progress=False)
    drawn = {"num_draws": 60, "progress": False, "batch_size": 3}
    for estimator in ("stratified", "monte_carlo"):
        likelihood = evaluate_likelihood(model, rows(), estimator=estimator, **drawn)
        assert abs(likelihood.nelbo - exact.nelbo) < 5 * likelihood.draw_standard_error < 0.2 * exact.nelbo


def test_windows_slide_over_text_that_is_longer_than_the_context():
    model = adapted_lm(block_size=4, overrides={"max_position_embeddings": 16})
    likelihood = evaluate_likelihood(model, rows(length=39), progress=False)
    assert (likelihood.window, likelihood.stride, likelihood.num_tokens) == (16, 8, 3 * 39)


def test_the_commands_read_an_adapted_folder(folder, trained, text_file, tmp_path, capsys):
    likelihood = tmp_path / "likelihood.json"
    assert main(["evaluate", str(trained), "--data", str(text_file), "--length", "32", "--json", str(likelihood)]) == 0
    assert json.loads(likelihood.read_text())["block_size"] == 4
    capsys.readouterr()
    assert main(["generate", str(trained), "Text", "--max_new_tokens", "5", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["text"].startswith("Text") and written["text"] != "Text"
    assert main(["push", str(trained), "user/smol", "--dry_run", "--likelihood", f"text={likelihood}"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "modeling_causal_lm.py" in printed and "nats per token" in printed
    (tmp_path / "samples.txt").write_text("a text\nand another")
    assert main(["quality", str(tmp_path / "samples.txt"), "--judge", str(trained)]) == 2
    assert "judge must be an autoregressive model, but a BlockDiffusionForMaskedLM" in capsys.readouterr().err
    # The tokens are what can be changed of a network that is there; sizes and dropout are not.
    command = ["train", "--data", str(text_file), "--model", str(folder), "--length", "32", "--report_to", "none"]
    assert main([*command, "--hidden_dropout", "0.1"]) == 2
    assert "--hidden_dropout cannot change what --model=" in capsys.readouterr().err
    assert main([*command, "--output_dir", str(tmp_path / "lora"), "--max_steps", "1", "--lora_rank", "2"]) == 0
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert adapter["trainable_token_indices"] == [259]
    assert main(["generate", str(tmp_path / "lora"), "Text", "--max_new_tokens", "5"]) == 0


def test_weights_of_lower_precision_are_trained_in_float32(source, text_file, tmp_path):
    assert main(["adapt", str(source), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    command = ["train", "--data", text_file, "--model", tmp_path / "half", "--length", 32, "--max_steps", 1]
    command += ["--report_to", "none", "--output_dir", tmp_path / "trained", "--max_eval_sequences", 16]
    assert main([str(word) for word in command]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "trained", dtype="auto").dtype == torch.float32


def test_a_run_resumes_from_its_checkpoint_and_from_no_other_network_s(trained, source):
    model = BlockDiffusionForMaskedLM.from_pretrained(trained)
    check_architecture(trained / "checkpoint-1", model.config)
    for changed, message in (
        (adapted_lm(), "vocab_size 260 there, 23 here"),
        (adapted_lm(model_type="qwen3"), "a network of the type 'llama' there"),
        (adapt(causal_lm(vocab_size=259), byte_tokenizer(), shift_logits=False)[0], "shift_logits True there, False"),
    ):
        with pytest.raises(ValueError, match=f"of another architecture than the model: .*{message}"):
            check_architecture(trained / "checkpoint-1", changed.config)


def test_the_summary_and_the_card_tell_of_the_network(trained):
    summary = TrainingSummary.from_folder(trained)
    assert summary.model["network"] == "llama" and summary.model["num_attention_heads"] == 4
    assert summary.model["shift_logits"] is True and summary.model["clean_attention"] == "causal"
    # 2 steps of 4 sequences of 32 tokens, of which the first of each is read only.
    assert summary.training["num_tokens"] == 2 * 4 * 31
    assert [row["weights_step"] for row in summary.evaluations] == [0, 2]
    card = prepare_files(trained, "user/smol")["README.md"].decode()
    assert "An autoregressive llama" in card and "248 tokens" in card
    assert "| 0 | held-out text |" in card and "| 2 | held-out text |" in card


def test_a_network_that_was_adapted_was_not_trained_from_scratch(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "unnamed", ignore=shutil.ignore_patterns("checkpoint-*"))
    record = json.loads((folder / SUMMARY_FILE).read_text())
    for base in (None, record["model"].get("adapted_from")):
        (folder / SUMMARY_FILE).write_text(json.dumps(record | {"base_model": base, "has_unnamed_base": False}))
        assert "from scratch" not in prepare_files(folder, "user/smol")["README.md"].decode()


def test_a_folder_without_a_record_has_a_card(folder):
    summary = TrainingSummary.from_folder(folder)
    assert (summary.model["network"], summary.model["num_hidden_layers"]) == ("llama", 2)
    assert b"An autoregressive llama" in prepare_files(folder, "user/smol")["README.md"]


def test_the_harness_scores_an_adapted_model_and_refuses_its_source(source, folder):
    harness = BD3LMHarness(str(folder), batch_size=2)
    request = SimpleNamespace(args=("Text number 1",))
    model, tokenizer = load_for_evaluation(str(folder))
    ids = [[tokenizer.bos_token_id, *tokenizer("Text number 1")["input_ids"], tokenizer.eos_token_id]]
    expected = evaluate_likelihood(model, ids, progress=False)
    (value,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert value == pytest.approx(-expected.nelbo * expected.num_tokens, rel=1e-5)
    pair = harness.loglikelihood([SimpleNamespace(args=("Text", " number"))], disable_tqdm=True)
    assert pair[0][0] < 0
    (text,) = harness.generate_until([SimpleNamespace(args=("Text", {"until": ["\n"], "max_gen_toks": 5}))])
    assert isinstance(text, str)
    with pytest.raises(ValueError, match="`pretrained` must be a block diffusion model, but .* is a 'llama'"):
        BD3LMHarness(str(source))


def test_an_adapted_model_is_no_judge_whatever_its_blocks(source):
    model, tokenizer = adapt(AutoModelForCausalLM.from_pretrained(source), byte_tokenizer(), block_size=1)
    with pytest.raises(ValueError, match="judge must be an autoregressive model, but a BlockDiffusionForMaskedLM"):
        generative_perplexity(["a text"], model.eval(), tokenizer, progress=False)


@pytest.mark.parametrize("shift_logits", [True, False])
def test_gaps_are_filled_inside_a_block_and_across_blocks(source, shift_logits):
    model, tokenizer = adapt(AutoModelForCausalLM.from_pretrained(source), byte_tokenizer(), shift_logits=shift_logits)
    filler = pipeline("text-infilling", model=model.eval(), tokenizer=tokenizer)
    filled = filler("Text ___ of ___ few.", placeholder="___", gap_length=[2, 7], do_sample=False)
    assert [len(span["token_ids"]) for span in filled["spans"]] == [2, 7]
    assert filled["text"].startswith("Text ") and filled["text"].endswith(" few.")
    ids = torch.tensor([[0, *range(3, 12), 20, 21]])
    is_new = torch.zeros(12, dtype=torch.bool)
    is_new[4:8] = True
    likelihood = likelihood_of_new_tokens(model, ids[0], is_new)
    assert likelihood.is_exact and likelihood.nelbo > 0


def test_an_adapter_trains_and_the_adapted_weights_stay(tmp_path):
    model = adapted_lm(block_size=4)
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    arguments = BD3LMTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, report_to="none", gradient_checkpointing=True, use_cpu=True
    )
    data = [{"input_ids": row} for row in rows(8)]
    trainer = BD3LMTrainer(peft_model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_nelbo"]
    trainer.train()
    assert trainer.evaluate()["eval_nelbo"] != before
    base = peft_model.unload()
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(weight, kept[name], rtol=0, atol=0)


def test_a_quantized_network_trains_an_adapter_and_the_mask_token(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'bd3lm-hf[quantizers]'")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    # Of a width that bitsandbytes packs.
    source = save_causal_lm(tmp_path / "source", hidden_size=64, intermediate_size=128)
    adapt_checkpoint(source, tmp_path / "adapted", clean_attention="causal")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "adapted", quantization_config=config)
    assert all(module.weight.dtype == torch.uint8 for name, module in model.named_modules() if name.endswith("_proj"))
    adapter = LoraConfig(
        target_modules="all-linear", trainable_token_indices=[model.config.mask_token_id], task_type="CAUSAL_LM"
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), adapter)
    arguments = BD3LMTrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=2e-2,
        mask_token_learning_rate=5e-2,
        loss_weight="uniform",
        autoregressive_loss_weight=0.5,
        ema_decay=0.5,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    data = [{"input_ids": [0, *[7, 8, 9, 10] * 4]}] * 8
    trainer = BD3LMTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    # On some CPUs bitsandbytes packs 4 bit weights when it evaluates, and can't train them then.
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_nelbo"] < losses[0]


def test_chats_are_learnt_by_the_trainers_of_this_package_and_of_trl(folder, tmp_path):
    pytest.importorskip("trl", reason="needs trl: pip install 'bd3lm-hf[trl]'")
    from trl import SFTConfig

    from bd3lm_hf.training.sft import BD3LMSFTTrainer

    tokenizer = load_tokenizer(folder)
    pairs = Dataset.from_list([{"prompt": f"{number}?", "completion": f" {number}!"} for number in range(16)])
    options = {"max_steps": 2, "report_to": "none", "use_cpu": True}
    sft = BD3LMSFTTrainer(
        str(folder), SFTConfig(str(tmp_path / "sft"), max_length=32, packing=True, **options), train_dataset=pairs
    )
    sft.train()
    sft.save_model()
    assert language_model_class(tmp_path / "sft") is BlockDiffusionForMaskedLM
    model = BlockDiffusionForMaskedLM.from_pretrained(folder)
    examples = prepare_finetuning(pairs, tokenizer, max_length=32, block_size=model.config.block_size)
    arguments = BD3LMTrainingArguments(str(tmp_path / "bd3lm"), noise_level_per="document", **options)
    trainer = BD3LMTrainer(model, arguments, train_dataset=pack_examples(examples, 32), eval_dataset=examples)
    before = trainer.evaluate()["eval_nelbo"]
    trainer.train()
    assert trainer.evaluate()["eval_nelbo"] != before


def test_the_app_shows_how_an_adapted_model_writes_and_is_written_as_a_space(folder, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'bd3lm-hf[app]'")
    from bd3lm_hf.app import make_page
    from bd3lm_hf.app.writing import Writer

    model, tokenizer = load_for_evaluation(str(folder))
    filler = pipeline("text-infilling", model=model, tokenizer=tokenizer)
    make_page(filler, "smol")
    choices = ("confidence", "2", 0, "", 0, 1, 0.9, "3", 0)
    *_, (html, _, figures) = Writer(filler).write("Text", 7, *choices)
    assert html.count('class="given"') == 4 and html.count('class="token') == 7 and "nats per token" in figures
    *_, (html, _, figures) = Writer(filler).fill("Text ___ of ___", 3, *choices)
    assert "nats per token" in figures
    assert main(["app", str(folder), "--space", str(tmp_path / "space")]) == 0
    assert (tmp_path / "space" / "model" / "modeling_causal_lm.py").is_file()
