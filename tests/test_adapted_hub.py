"""A folder of an adapted network where this package is not installed, and the same from a Hub on the loopback."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from adapted_cases import MASK, VOCAB_SIZE, adapt, noised, random_ids
from loopback_hub import LoopbackHub
from test_hub import run_without_the_package, word_tokenizer

from bd3lm_hf import BlockDiffusionConfig, BlockDiffusionModel


# One with two types of layers, and one whose weights are tied.
NAMES = ["gemma3", pytest.param("qwen3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """A saved model and its tokenizer, with what the model that was saved computes and writes."""
    folder = tmp_path_factory.mktemp(request.param)
    model, ids = adapt(request.param), random_ids(2, 11)
    assert model.config.mask_token_id == MASK == VOCAB_SIZE - 1
    model.save_pretrained(folder)
    word_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    with torch.no_grad():
        logits = model(noised(ids)).logits
    text = model.generate(ids, max_new_tokens=6, sampler="confidence", do_sample=False)
    torch.save({"ids": ids, "x_t": noised(ids), "logits": logits, "text": text}, folder / "expected.pt")
    return folder


VISIT = """
    import torch
    from datasets import Dataset
    from transformers import (
        AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer,
        DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline,
    )
    trusted = {"trust_remote_code": True}
    expected = torch.load(expected)
    config = AutoConfig.from_pretrained(name, **trusted)
    assert config.block_size == 4 and type(config).__module__.startswith("transformers_modules")
    with torch.no_grad():
        for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
            model = auto.from_pretrained(name, **trusted)
            torch.testing.assert_close(model(expected["x_t"]).logits, expected["logits"], atol=1e-5, rtol=0)
            text = model.generate(expected["ids"], max_new_tokens=6, sampler="confidence", do_sample=False)
            assert torch.equal(text, expected["text"])
        states = AutoModel.from_pretrained(name, **trusted)(expected["x_t"]).last_hidden_state
        scores = model.get_output_embeddings()(states)[:, :-1]
        torch.testing.assert_close(scores, expected["logits"][:, 1:], atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    pipe = pipeline("text-generation", model=name, tokenizer=tokenizer, **trusted)
    for output in pipe(["w1 w2 w3", "w4"], max_new_tokens=6, sampler="confidence", batch_size=2):
        assert len(output[0]["generated_text"].split()) > 3
    before = {part: parameter.clone() for part, parameter in model.named_parameters()}
    data = Dataset.from_dict({"input_ids": [[row + column for column in range(12)] for row in range(8)]})
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
    assert trainer.evaluate()["eval_loss"] > 0
    changed = [part for part, value in model.named_parameters() if not torch.equal(before[part], value)]
    assert len(changed) > 0.9 * len(before), sorted(set(before) - set(changed))
    trainer.save_model("trained/final")
    again = AutoModelForCausalLM.from_pretrained("trained/final", **trusted)
    for part, value in model.named_parameters():
        assert torch.equal(again.get_parameter(part), value.cpu()), part
    again.generate(expected["ids"], max_new_tokens=3)
    # The stock class reads the weights, too.
    config = again.config.text_config
    stock = AutoModelForCausalLM.from_pretrained("trained/final", config=config, trust_remote_code=False)
    assert type(stock).__module__.startswith("transformers.models")
    torch.testing.assert_close(stock.eval()(expected["ids"]).logits.shape, expected["logits"].shape)
    for part, value in stock.named_parameters():
        assert torch.equal(again.get_parameter(part), value), part
"""


def test_the_auto_map_and_the_sources_lie_beside_the_weights(saved, tmp_path):
    expected = {
        "AutoConfig": "configuration_causal_lm.BlockDiffusionConfig",
        "AutoModel": "modeling_causal_lm.BlockDiffusionModel",
        "AutoModelForMaskedLM": "modeling_causal_lm.BlockDiffusionForMaskedLM",
        "AutoModelForCausalLM": "modeling_causal_lm.BlockDiffusionForMaskedLM",
    }
    assert json.loads((saved / "config.json").read_text())["auto_map"] == expected
    names = {path.name for path in saved.iterdir()}
    assert {"modeling_causal_lm.py", "configuration_causal_lm.py", "network_block_diffusion.py"} <= names
    text_config = BlockDiffusionConfig.from_pretrained(saved).text_config
    BlockDiffusionModel(BlockDiffusionConfig(text_config=text_config)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == expected


def test_the_folder_loads_trains_generates_and_serves_without_the_package(saved, tmp_path):
    given = f"name, expected = {str(saved)!r}, {str(saved / 'expected.pt')!r}\n"
    run_without_the_package(given + textwrap.dedent(VISIT), tmp_path)


PUBLISH = """
import sys
from bd3lm_hf import BlockDiffusionForMaskedLM
from transformers import AutoTokenizer
BlockDiffusionForMaskedLM.from_pretrained(sys.argv[1]).push_to_hub("user/adapted", token="hf_owner")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("user/adapted", token="hf_owner")
"""


@pytest.mark.slow
def test_from_the_hub_it_works_without_the_package(saved, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        run([PUBLISH, str(saved)])
        given = f"name, expected = 'user/adapted', {str(saved / 'expected.pt')!r}\n"
        run(["import sys\nsys.modules['bd3lm_hf'] = None\n" + given + textwrap.dedent(VISIT)], cwd=tmp_path)


def run(arguments, **kwargs):
    result = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=600, **kwargs)
    assert result.returncode == 0, result.stderr[-4000:]
