"""A saved folder on a machine without this package: everything through the remote code beside the weights."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import randomize, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bd3lm_hf import BD3LMForMaskedLM, BD3LMModel


SOURCES = {
    "attention_block_diffusion.py",
    "configuration_bd3lm.py",
    "denoising_block_diffusion.py",
    "diffusion_block_diffusion.py",
    "generation_block_diffusion.py",
    "loss_block_diffusion.py",
    "network_block_diffusion.py",
    "two_stream_block_diffusion.py",
    "modeling_bd3lm.py",
    "samplers_block_diffusion.py",
}


def word_tokenizer(vocab_size):
    words = {f"w{index}": index for index in range(vocab_size - 3)}
    words |= {"[BOS]": vocab_size - 3, "[PAD]": vocab_size - 2, "[MASK]": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", pad_token="[PAD]", mask_token="[MASK]", padding_side="left"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model and its tokenizer, and the logits and the greedy text of the model that was saved."""
    folder = tmp_path_factory.mktemp("saved")
    model = randomize(BD3LMForMaskedLM(tiny_config(pad_token_id=21))).eval()
    model.save_pretrained(folder)
    word_tokenizer(model.config.vocab_size).save_pretrained(folder)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, folder / "logits.pt")
    torch.save(model.generate(ids, max_new_tokens=6, sampler="confidence", do_sample=False), folder / "text.pt")
    return folder


def run_without_the_package(code, tmp_path):
    """Runs `code` in a fresh process, elsewhere, in which importing bd3lm_hf fails."""
    prelude = """
        import sys
        sys.modules["bd3lm_hf"] = None
        try:
            import bd3lm_hf
        except ImportError:
            pass
        else:
            raise SystemExit("bd3lm_hf can be imported")
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_sources_and_the_auto_map_lie_beside_the_weights(saved, tmp_path):
    assert SOURCES <= {path.name for path in saved.iterdir()}
    expected = {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig",
        "AutoModel": "modeling_bd3lm.BD3LMModel",
        "AutoModelForMaskedLM": "modeling_bd3lm.BD3LMForMaskedLM",
        "AutoModelForCausalLM": "modeling_bd3lm.BD3LMForMaskedLM",
    }
    assert json.loads((saved / "config.json").read_text())["auto_map"] == expected
    BD3LMModel(tiny_config()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == expected
    assert SOURCES <= {path.name for path in tmp_path.iterdir()}


def test_the_folder_loads_generates_and_serves_without_the_package(saved, tmp_path):
    run_without_the_package(
        f"""
        import torch
        from transformers import (
            AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
        )
        folder = {str(saved)!r}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.block_size == 4 and type(config).__module__.startswith("transformers_modules")
        ids = torch.arange(12)[None]
        logits, text = torch.load(folder + "/logits.pt"), torch.load(folder + "/text.pt")
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
            for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
                model = auto.from_pretrained(folder, trust_remote_code=True)
                torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=0)
                torch.testing.assert_close(model.lm_head(hidden), logits, atol=1e-5, rtol=0)
                generated = model.generate(ids, max_new_tokens=6, sampler="confidence", do_sample=False)
                assert torch.equal(generated, text)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pipe = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
        outputs = pipe(["w1 w2 w3", "w4"], max_new_tokens=6, sampler="confidence", batch_size=2)
        for prompt, output in zip(["w1 w2 w3", "w4"], outputs):
            text = output[0]["generated_text"]
            assert text.startswith(prompt) and len(text.split()) > len(prompt.split()), text
        """,
        tmp_path,
    )


def test_the_folder_trains_with_the_plain_trainer_and_saves_a_folder_that_loads(saved, tmp_path):
    run_without_the_package(
        f"""
        import torch
        from datasets import Dataset
        from transformers import (
            AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer,
            TrainingArguments,
        )
        tokenizer = AutoTokenizer.from_pretrained({str(saved)!r})
        model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
        before = {{name: parameter.clone() for name, parameter in model.named_parameters()}}
        data = Dataset.from_dict({{"input_ids": [[row + column for column in range(12)] for row in range(8)]}})
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                "trained", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-2
            ),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
        assert len(losses) == 1 and 0 < losses[0] < 100
        assert trainer.evaluate()["eval_loss"] > 0
        assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
        trainer.save_model("trained/final")
        for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
            again = auto.from_pretrained("trained/final", trust_remote_code=True)
            for name, value in model.named_parameters():
                assert torch.equal(again.get_parameter(name), value.cpu()), name
        again.generate(torch.arange(5)[None], max_new_tokens=3)
        """,
        tmp_path,
    )


def test_without_trust_transformers_refuses(saved, tmp_path):
    run_without_the_package(
        f"""
        from transformers import AutoModelForMaskedLM
        try:
            AutoModelForMaskedLM.from_pretrained({str(saved)!r}, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        else:
            raise SystemExit("loaded without trust")
        """,
        tmp_path,
    )


def test_modeling_imports_only_what_every_machine_with_transformers_has():
    import ast
    from pathlib import Path

    import bd3lm_hf.modeling

    allowed = {"torch", "transformers"} | set(sys.stdlib_module_names)
    for path in Path(bd3lm_hf.modeling.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path
