"""BD3LMTrainer and `bd3lm`: a model that is made by a function, search, checkpoints, adapters, publishing."""

import json
import os

import pytest
import torch
from conftest import random_model
from datasets import Dataset
from transformers import GenerationConfig, trainer
from transformers.trainer_utils import HPSearchBackend

from bd3lm_hf import BD3LMForMaskedLM, BD3LMTrainer, BD3LMTrainingArguments, train_tokenizer
from bd3lm_hf.cli.push import run as push
from bd3lm_hf.cli.train import train_arguments, train_model
from bd3lm_hf.training.trainer import first_nelbo


def rows(lengths=(16, 12), number=16):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(22, (lengths[i % len(lengths)],), generator=generator)} for i in range(number)]


def arguments(folder, **overrides):
    values = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    return BD3LMTrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **{**values, **overrides}
    )


@pytest.mark.parametrize("name", ["eval_do_concat_batches", "batch_eval_metrics"])
def test_evaluations_that_keep_batches_apart_are_refused_at_construction(tmp_path, name):
    wanted = name == "eval_do_concat_batches"
    with pytest.raises(ValueError, match=f"`{name}` must be {wanted}: .* but got {not wanted}"):
        arguments(tmp_path, **{name: not wanted})


def test_a_model_made_by_a_function_is_trained_as_one_that_is_given(tmp_path):
    def losses(**model):
        args = arguments(tmp_path, noise_interval=(0.3, 0.8), fix_noise_interval=True)
        trainer = BD3LMTrainer(args=args, train_dataset=rows(), eval_dataset=rows(), **model)
        trainer.train()
        assert trainer.config.noise_interval == (0.3, 0.8)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def model_init():
        return random_model(attn_implementation="sdpa", pad_token_id=0)

    assert losses(model_init=model_init) == losses(model=model_init())


def test_a_function_that_makes_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a BD3LMForMaskedLM .* but got Linear"):
        BD3LMTrainer(args=arguments(tmp_path), model_init=lambda: torch.nn.Linear(2, 2), train_dataset=rows())


def test_the_default_objective_of_a_search_is_the_nelbo(tmp_path, monkeypatch):
    class TwoTrials:
        default_hp_space = None

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            objectives = []
            for learning_rate in (1e-4, 1e-1):
                trainer.args.learning_rate = learning_rate
                trainer.train()
                metrics = trainer.evaluate()
                objectives.append((trainer.compute_objective(metrics), metrics["eval_nelbo"]))
            return objectives

    monkeypatch.setitem(trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.RAY, TwoTrials)
    searched = BD3LMTrainer(
        args=arguments(tmp_path),
        model_init=lambda: random_model(attn_implementation="sdpa"),
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    objectives = searched.hyperparameter_search(backend="ray")
    assert all(objective == nelbo for objective, nelbo in objectives) and objectives[0] != objectives[1]
    assert searched.hyperparameter_search(None, lambda metrics: -1.0, backend="ray")[0][0] == -1.0
    assert first_nelbo({"eval_a_loss": 1, "eval_a_nelbo": 2, "eval_b_nelbo": 3}) == 2


def test_checkpoints_are_saved_with_sampling_arguments(tmp_path):
    model = random_model(attn_implementation="sdpa")
    model.generation_config.temperature = 0.7
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    BD3LMTrainer(model, args, train_dataset=rows()).train()
    saved = GenerationConfig.from_pretrained(tmp_path / "checkpoint-2")
    assert saved.temperature == 0.7 and saved.do_sample


def test_only_checkpoints_of_a_number_are_deleted_as_surplus(tmp_path):
    kept = tmp_path / "checkpoint-old"
    kept.mkdir()
    # Trainer sorts by age, which it believes where the folders were not made at once.
    os.utime(kept, (0, 0))
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    BD3LMTrainer(random_model(attn_implementation="sdpa"), args, train_dataset=rows()).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-old", "checkpoint-3"}
    assert args.save_total_limit == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its tokenizer in one folder, and a text to train on."""
    folder = tmp_path_factory.mktemp("saved")
    texts = Dataset.from_dict({"text": ["to be or not to be that is the question " * 8] * 8})
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    random_model(vocab_size=len(tokenizer), **special).save_pretrained(folder)
    (folder / "corpus.txt").write_text("\n\n".join(texts["text"]))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_bd3lm_train_is_loaded_by_the_auto_class_of_peft(saved, tmp_path):
    peft = pytest.importorskip("peft")
    flags = f"--data {saved}/corpus.txt --model {saved} --lora_rank 2 --length 16 --max_steps 2 --learning_rate 0.1"
    flags += f" --output_dir {tmp_path} --report_to none --use_cpu True --save_strategy no"
    flags += " --per_device_train_batch_size 2 --per_device_eval_batch_size 1"
    train_model(*train_arguments(flags.split()))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.get_base_model(), BD3LMForMaskedLM)
    ids = torch.arange(3, 19)[None]
    assert not torch.allclose(loaded(input_ids=ids).logits, BD3LMForMaskedLM.from_pretrained(saved)(ids).logits)
    assert loaded(input_ids=ids, labels=ids).loss > 0
    assert loaded.generate(input_ids=ids, max_new_tokens=4).shape == (1, 20)


def test_publishing_with_the_models_own_tokenizer_asks_nothing(saved, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust the code"))
    push([str(saved), "user/model", "--tokenizer", str(saved), "--dry_run"])
    assert "AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)" in capsys.readouterr().out
