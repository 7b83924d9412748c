"""Adapters: trained by BD3LMTrainer and the plain Trainer, saved, loaded onto the base, merged, generated from."""

from pathlib import Path

import pytest
import torch
from conftest import DEVICE, randomize
from transformers import Trainer, TrainingArguments

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMTrainer, BD3LMTrainingArguments


peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

README = Path(__file__).parents[1] / "README.md"
LENGTH = 32


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A model of bytes, large enough that an adapter is a small part of it."""
    folder = tmp_path_factory.mktemp("base")
    config = BD3LMConfig(
        vocab_size=257,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        block_size=4,
        hidden_dropout=0.0,
        ignore_bos=False,
    )
    randomize(BD3LMForMaskedLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts():
    text = README.read_bytes()
    return datasets.Dataset.from_dict({"input_ids": [list(text[i : i + LENGTH]) for i in range(0, 4096, LENGTH)]})


def adapted(folder, **kwargs):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", **kwargs)
    return peft.get_peft_model(BD3LMForMaskedLM.from_pretrained(folder).to(DEVICE), config)


def train(model, texts, folder, trainer_class=BD3LMTrainer, args_class=BD3LMTrainingArguments, steps=30, **kwargs):
    args = args_class(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        **kwargs,
    )
    trainer = trainer_class(model, args, train_dataset=texts, eval_dataset=texts.select(range(16)))
    trainer.train()
    return trainer


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_trained_saved_loaded_merged_and_generated_from(base_folder, texts, tmp_path, use_dora):
    model = adapted(base_folder, use_dora=use_dora)
    trained, total = model.get_nb_trainable_parameters()
    assert trained < 0.05 * total

    base = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    trainer = BD3LMTrainer(
        model,
        BD3LMTrainingArguments(str(tmp_path), report_to=[], use_cpu=DEVICE.type == "cpu", disable_tqdm=True),
        eval_dataset=texts.select(range(16)),
    )
    before = trainer.evaluate()["eval_nelbo"]
    trainer = train(model, texts, tmp_path)
    assert trainer.evaluate()["eval_nelbo"] < 0.9 * before
    assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in base.items())

    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(
        BD3LMForMaskedLM.from_pretrained(base_folder).to(DEVICE), tmp_path / "adapter"
    ).eval()
    ids = torch.tensor(texts[:2]["input_ids"])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        base_model = BD3LMForMaskedLM.from_pretrained(base_folder).to(DEVICE).eval()
        assert not torch.allclose(base_model(input_ids=ids).logits, expected, atol=0.1)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    sequences = [
        one.generate(input_ids=ids[:, :8], max_new_tokens=8, do_sample=False, sampler="confidence", denoising_steps=2)
        for one in (model, merged)
    ]
    assert torch.equal(*sequences)
    assert sequences[0].shape == (2, 16)


def test_the_plain_trainer_trains_an_adapter(base_folder, texts, tmp_path):
    model = adapted(base_folder)
    texts = texts.add_column("labels", texts["input_ids"])
    trainer = train(model, texts, tmp_path, trainer_class=Trainer, args_class=TrainingArguments)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_moving_average_is_of_the_adapter_alone(base_folder, texts, tmp_path):
    trainer = train(adapted(base_folder), texts, tmp_path, steps=1)
    trainer.ema_callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    kept = trainer.ema_callback.weights.names
    assert kept and all("lora_" in name for name in kept)


def test_tuned_norms_generate(base_folder):
    model = BD3LMForMaskedLM.from_pretrained(base_folder).to(DEVICE)
    prompt = torch.tensor([[1, 2, 3]])
    expected = model.generate(prompt, max_new_tokens=9, seed=0)
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=norms))
    assert torch.equal(tuned.generate(input_ids=prompt, max_new_tokens=9, seed=0), expected)
