"""TRL's supervised fine-tuning with the block diffusion loss: it learns, and never from what it must not see."""

import copy
import logging
import random
import sys
from importlib import import_module

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMConfig, BD3LMDataCollator, BD3LMForMaskedLM, prepare_finetuning, train_tokenizer
from bd3lm_hf.data.finetuning import pack_examples


trl = pytest.importorskip("trl", reason="needs trl: pip install 'bd3lm-hf[trl]'")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer
BD3LMSFTTrainer = import_module("bd3lm_hf.training.sft").BD3LMSFTTrainer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
COLOURS = ("red", "blue", "green", "small", "large", "old", "new", "warm")
THINGS = ("house", "river", "garden", "window", "road", "ship", "tower", "bridge")


def question_and_answer(rng):
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    return f"Which {thing} is it?", f" The {colour} {thing} is the {thing} that is {colour}."


RNG = random.Random(0)
PAIRS = [question_and_answer(RNG) for _ in range(320)]
NUM_TRAINED = 288


def chat(*pairs):
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


TEXTS = [{"text": question + answer} for question, answer in PAIRS]
COMPLETIONS = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
CHATS = [{"messages": chat(*pairs)} for pairs in zip(PAIRS, PAIRS[1:] + PAIRS[:1])]
# The rows of each form, and the arguments that go with it.
FORMS = {
    "text": (TEXTS, {}),
    "completion": (COMPLETIONS, {}),
    "chat": ([{"messages": chat(pair)} for pair in PAIRS], {"assistant_only_loss": True}),
    "packing": (COMPLETIONS, {"packing": True}),
    "lora": (TEXTS, {"gradient_checkpointing": True}),
}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(Dataset.from_list(TEXTS), vocab_size=320)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory):
    """A model that has learned to use what it sees, but not yet all there is to know."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = BD3LMConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        block_size=4,
        hidden_dropout=0.0,
        cond_dim=16,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = make_trainer(BD3LMForMaskedLM(config), tokenizer, folder, max_steps=80)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def model(base_folder):
    return BD3LMForMaskedLM.from_pretrained(base_folder)


def arguments(folder, **kwargs):
    fixed = {
        "max_steps": 30,
        "max_length": 64,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return SFTConfig(str(folder), **{**fixed, **kwargs})


def make_trainer(model, tokenizer, folder, form="text", trainer_class=BD3LMSFTTrainer, **kwargs):
    """A trainer of one of the `FORMS`; `kwargs` are those of `arguments`."""
    rows, form_kwargs = FORMS[form]
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if form == "lora" else None
    return trainer_class(
        model,
        arguments(folder, **{**form_kwargs, **kwargs}),
        train_dataset=Dataset.from_list(rows[:NUM_TRAINED]),
        eval_dataset=Dataset.from_list(rows[NUM_TRAINED:]),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=adapter,
    )


def nelbo(trainer):
    return trainer.evaluate()["eval_nelbo"]


# It learns.


@pytest.mark.parametrize("form", FORMS)
def test_the_held_out_nelbo_falls(model, tokenizer, tmp_path, form):
    trainer = make_trainer(model, tokenizer, tmp_path, form)
    before = nelbo(trainer)
    trainer.train()
    after = nelbo(trainer)
    # Both met the same noise.
    assert after < before - (0.03 if form == "lora" else 0.1)


def test_the_loss_of_trl_makes_the_held_out_nelbo_worse(model, tokenizer, tmp_path):
    before = nelbo(make_trainer(copy.deepcopy(model), tokenizer, tmp_path))
    try:
        trainer = make_trainer(model, tokenizer, tmp_path, trainer_class=SFTTrainer, max_steps=60)
    except ValueError:
        # A model that refuses to be trained so is just as well.
        return
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = copy.deepcopy(model)
    vars(trained).pop("forward", None)
    trained.load_state_dict(model.state_dict())
    assert nelbo(make_trainer(trained, tokenizer, tmp_path)) > before + 0.3


def test_the_warning_of_next_token_losses_is_not_for_this_trainer(model, tokenizer, tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()
    make_trainer(model, tokenizer, tmp_path / "ours")
    assert not [message for message in caplog.messages if "next token" in message]
    make_trainer(copy.deepcopy(model), tokenizer, tmp_path / "theirs", trainer_class=SFTTrainer)
    assert [message for message in caplog.messages if "next token" in message]


def test_nothing_is_logged_that_is_read_off_logits(model, tokenizer, tmp_path):
    trainer = make_trainer(
        model, tokenizer, tmp_path, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"loss", "eval_loss", "eval_nelbo", "eval_perplexity"} <= logged
    assert not [name for name in logged if "entropy" in name or "accuracy" in name]


# What is predicted, and what is seen.


class RecordingTrainer(BD3LMSFTTrainer):
    """Keeps the batches that it trains on."""

    batches = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches = [*self.batches, inputs]
        return super().compute_loss(model, inputs, *args, **kwargs)


PREDICTED = {
    "text": (TEXTS, {}, lambda text: [text["text"] + "</s>"]),
    "completion": (COMPLETIONS, {}, lambda pair: [pair["completion"] + "</s>"]),
    "whole": (
        COMPLETIONS,
        {"completion_only_loss": False},
        lambda pair: [pair["prompt"] + pair["completion"] + "</s>"],
    ),
    "chat": (
        CHATS,
        {"assistant_only_loss": True},
        lambda chat: [turn["content"] + "</s>" for turn in chat["messages"] if turn["role"] == "assistant"],
    ),
    "answer": (
        [{"prompt": chat[:3], "completion": chat[3:]} for chat in (row["messages"] for row in CHATS)],
        {},
        lambda chat: [chat["completion"][0]["content"] + "</s>"],
    ),
    "packing": (COMPLETIONS, {"packing": True}, lambda pair: [pair["completion"] + "</s>"]),
}


@pytest.mark.parametrize("form", PREDICTED)
def test_only_what_is_predicted_is_ever_masked(model, tokenizer, tmp_path, form, recorded_draws):
    rows, kwargs, predicted = PREDICTED[form]
    trainer = RecordingTrainer(
        model,
        arguments(tmp_path, max_steps=6, max_length=128, per_device_train_batch_size=4, learning_rate=0.0, **kwargs),
        train_dataset=Dataset.from_list(rows[:4]),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    mask_token_id = model.config.mask_token_id
    ever_masked = set()
    for batch, (_, _, x_t) in zip(trainer.batches, recorded_draws, strict=True):
        is_masked, is_predicted = x_t == mask_token_id, batch["labels"] != -100
        assert is_masked.any() and not (is_masked & ~is_predicted).any()
        assert torch.equal(x_t[~is_masked], batch["input_ids"][~is_masked])
        ever_masked |= set(batch["input_ids"][is_masked].tolist())
    assert tokenizer.pad_token_id not in ever_masked and tokenizer.eos_token_id in ever_masked
    # What is predicted are the texts that should be, each in one piece; BOS is what they start from.
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        runs = [[]]
        for token, label in zip(ids, labels):
            assert label in (-100, token)
            runs = [*runs[:-1], [*runs[-1], token]] if label != -100 else [*runs, []]
        found += [tokenizer.decode(run) for run in runs if run]
    assert sorted(found) == sorted(text for row in rows[:4] for text in predicted(row))


def all_masked(model, batch):
    """The loss where all that is predicted is masked, summed over the batch, in nats."""
    labels = batch["labels"]
    text = {name: batch[name] for name in ("attention_mask", "document_ids") if name in batch}
    with torch.no_grad():
        output = model(
            input_ids=torch.where(labels == -100, batch["input_ids"], model.config.mask_token_id),
            clean_input_ids=batch["input_ids"],
            labels=labels,
            loss_weights=torch.ones(labels.shape),
            num_items_in_batch=1,
            **text,
        )
    return output.loss.item()


def test_packed_texts_do_not_see_each_other(model, tokenizer, tmp_path):
    packed = make_trainer(model, tokenizer, tmp_path, "packing", per_device_train_batch_size=4)
    alone = make_trainer(model, tokenizer, tmp_path, "completion", per_device_train_batch_size=NUM_TRAINED)
    (texts,) = alone.get_train_dataloader()
    is_text = texts["attention_mask"].bool()
    labels_of_text = {
        tuple(ids[mask].tolist()): labels[mask]
        for ids, mask, labels in zip(texts["input_ids"], is_text, texts["labels"])
    }
    for batch in list(packed.get_train_dataloader())[:3]:
        expected = 0.0
        for ids, documents in zip(batch["input_ids"], batch["document_ids"]):
            assert documents.max() >= 2
            for number in documents[documents > 0].unique():
                text = ids[documents == number]
                labels = labels_of_text[tuple(text.tolist())]
                expected += all_masked(model, {"input_ids": text[None], "labels": labels[None]})
        found = all_masked(model, batch)
        assert found == pytest.approx(expected, rel=1e-5)
        # Where they see each other, the loss is another.
        del batch["document_ids"]
        assert abs(all_masked(model, batch) - found) > 1e-3 * found


def test_trainer_counts_the_tokens_that_the_model_predicts(model, tokenizer, tmp_path):
    for form in ("text", "chat", "packing"):
        trainer = make_trainer(model, tokenizer, tmp_path, form)
        (batch,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        losses = []
        for denominator in (None, num_items, 2 * num_items):
            torch.manual_seed(0)
            losses.append(trainer.compute_loss(model, batch, num_items_in_batch=denominator).item())
        assert losses[1] == pytest.approx(losses[0]) and losses[2] == pytest.approx(losses[0] / 2)


def test_a_batch_in_which_nothing_is_predicted_has_no_loss(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    batch = trainer.data_collator([{"input_ids": [0, 5, 6], "labels": [-100] * 3}])
    assert trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(0)).item() == 0


# Evaluation


def test_two_evaluations_of_the_same_weights_agree(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(trainer.evaluate())
    for name in ("eval_loss", "eval_nelbo", "eval_perplexity"):
        assert results[0][name] == results[1][name]
    # In training each draw of the loss is another, and goes on as if there had been no evaluation in between.
    batch = next(iter(trainer.get_eval_dataloader()))
    losses = []
    for is_interrupted in (False, True):
        torch.manual_seed(0)
        for _ in range(2):
            losses.append(model.train()(**batch).loss.item())
            if is_interrupted:
                trainer.prediction_step(model.eval(), batch)
    assert losses[0] != losses[1] and losses[:2] == losses[2:]


def test_the_evaluation_does_not_depend_on_the_batches(model, tokenizer, tmp_path):
    for form in ("completion", "packing"):
        found = [
            nelbo(make_trainer(model, tokenizer, tmp_path, form, per_device_eval_batch_size=batch_size))
            for batch_size in (8, 5)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_evaluated_loss_weighs_tokens_and_not_batches(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    short, long = [{"text": "The"}] * 8, TEXTS[:4]
    batches = []

    def record(module, args, kwargs, output):
        batches.append((output.loss.item(), (kwargs["labels"] != -100).sum().item()))

    handle = model.register_forward_hook(record, with_kwargs=True)
    found = trainer.evaluate(Dataset.from_list(short + long))["eval_loss"]
    handle.remove()
    assert len(batches) == 2
    mean_of_batches = sum(loss for loss, _ in batches) / 2
    mean_of_tokens = sum(loss * num_tokens for loss, num_tokens in batches) / sum(n for _, n in batches)
    assert found == pytest.approx(mean_of_tokens, rel=1e-5)
    assert abs(mean_of_batches - mean_of_tokens) > 0.1


def test_several_evaluation_sets_and_predict(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    sets = {"a": Dataset.from_list(TEXTS[:8]), "b": Dataset.from_list(TEXTS[8:16])}
    assert {"eval_a_nelbo", "eval_b_nelbo"} <= set(trainer.evaluate(sets))
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions is None and output.metrics["test_nelbo"] == nelbo(trainer)


# Datasets that are tokenized already


def test_prepared_examples_are_taken_as_they_are(model, tokenizer, tmp_path):
    examples = prepare_finetuning(Dataset.from_list(COMPLETIONS[:8]), tokenizer, block_size=4)
    for dataset in (examples, pack_examples(examples, 64)):
        trainer = BD3LMSFTTrainer(
            model, arguments(tmp_path), train_dataset=dataset, processing_class=copy.deepcopy(tokenizer)
        )
        expected = BD3LMDataCollator(tokenizer.pad_token_id)(list(dataset))
        (batch,) = trainer.get_train_dataloader()
        order = torch.tensor(sorted(range(len(dataset)), key=lambda row: batch["input_ids"][row].tolist()))
        expected_order = sorted(range(len(dataset)), key=lambda row: expected["input_ids"][row].tolist())
        assert batch.keys() == expected.keys() and ("document_ids" in batch) == (dataset is not examples)
        for name in batch:
            assert torch.equal(batch[name][order], expected[name][torch.tensor(expected_order)])
    with pytest.raises(ValueError, match="`packing` and `eval_packing` must be False .* `document_ids`"):
        BD3LMSFTTrainer(model, arguments(tmp_path, packing=True), train_dataset=dataset, processing_class=tokenizer)


def test_padding_is_no_text(model, tokenizer, tmp_path):
    padded = tokenizer([text["text"] for text in TEXTS[:4]] + ["The"], padding=True)
    for packing in (False, True):
        trainer = BD3LMSFTTrainer(
            model,
            arguments(tmp_path, packing=packing),
            train_dataset=Dataset.from_dict({name: padded[name] for name in ("input_ids", "attention_mask")}),
            processing_class=copy.deepcopy(tokenizer),
        )
        assert trainer.train_dataset.num_rows == (2 if packing else 5)
        assert not [ids for ids in trainer.train_dataset["input_ids"] if tokenizer.pad_token_id in ids]


def test_a_stream_is_trained_on(model, tokenizer, tmp_path):
    dataset = Dataset.from_list(COMPLETIONS).to_iterable_dataset()
    trainer = BD3LMSFTTrainer(
        model, arguments(tmp_path, max_steps=2, packing=True), train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    assert next(iter(trainer.get_train_dataloader()))["document_ids"].max() > 1


# Saved, resumed and loaded


def test_a_resumed_run_ends_as_an_uninterrupted_one(model, tokenizer, tmp_path):
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    untrained = copy.deepcopy(model)
    make_trainer(model, tokenizer, tmp_path, "packing", **kwargs).train()
    resumed = make_trainer(untrained, tokenizer, tmp_path, "packing", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_trained_model_loads_as_any_other(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([tokenizer("Which house")["input_ids"]])
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert (tmp_path / "tokenizer.json").is_file() and list(tmp_path.glob("modeling_*.py"))


def test_the_model_keeps_its_own_forward(model, tokenizer, tmp_path):
    # TRL binds a forward to this very object, and copies of it would compute with its weights.
    trainer = make_trainer(model, tokenizer, tmp_path)
    silenced = copy.deepcopy(trainer.model)
    torch.nn.init.zeros_(silenced.lm_head.weight)
    ids = torch.tensor([[0, 5, 6]])
    assert not torch.equal(silenced(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_an_adapter_is_saved_with_its_task_type_and_loads(model, tokenizer, base_folder, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, "lora", max_steps=4)
    assert trainer.model.get_nb_trainable_parameters()[0] < 0.5 * model.num_parameters()
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(BD3LMForMaskedLM.from_pretrained(base_folder), tmp_path).eval()
    assert loaded.active_peft_config.task_type == "CAUSAL_LM"
    prompt = tokenizer("Which house is it?", return_tensors="pt")
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=prompt["input_ids"]).logits
        assert torch.equal(loaded(input_ids=prompt["input_ids"]).logits, expected)
        base = BD3LMForMaskedLM.from_pretrained(base_folder).eval()
        assert not torch.allclose(base(input_ids=prompt["input_ids"]).logits, expected, atol=1e-2)
    texts = [one.generate(**prompt, max_new_tokens=8, seed=0) for one in (loaded, trainer.model)]
    assert torch.equal(*texts) and texts[0].shape[1] > prompt["input_ids"].shape[1]


def test_a_model_is_loaded_by_its_name(base_folder, tmp_path):
    args = arguments(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, trust_remote_code=True)
    for given, dtype in ((arguments(tmp_path), torch.float32), (args, torch.bfloat16)):
        trainer = BD3LMSFTTrainer(str(base_folder), given, train_dataset=Dataset.from_list(TEXTS))
        assert type(trainer.model) is BD3LMForMaskedLM and trainer.model.dtype == dtype
        assert trainer.processing_class.mask_token_id == trainer.model.config.mask_token_id
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    # A folder without a tokenizer takes the one that is given.
    trainer.model.save_pretrained(tmp_path / "bare")
    given = {"train_dataset": Dataset.from_list(TEXTS), "processing_class": trainer.processing_class}
    BD3LMSFTTrainer(str(tmp_path / "bare"), arguments(tmp_path), **given)


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": "dft"}, "`loss_type` must be 'nll', but got 'dft'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0, but got 0.1"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` must be False, but got True"),
        ({"padding_free": True, "max_length": None}, "`padding_free` must be False, .*take `packing=True`"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` must be 'bfd' or 'bfd_split', but"),
        ({"truncation_mode": "keep_end"}, "`truncation_mode` must be 'keep_start', but got 'keep_end'"),
        ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef` must be None or 0, but got 0.1"),
        ({"batch_eval_metrics": True}, "`batch_eval_metrics` must be False, but got True"),
        ({"eval_do_concat_batches": False}, "`eval_do_concat_batches` must be True, but got False"),
        ({"chat_template_path": "some/model"}, "`chat_template_path` must be a Jinja file .* got 'some/model'"),
        (
            {"metric_for_best_model": "eval_nelbo", "load_best_model_at_end": True, "eval_strategy": "steps"}
            | {"save_strategy": "steps", "eval_steps": 2, "save_steps": 2},
            "`greater_is_better` must be False, but got True for 'eval_nelbo'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arguments_without_a_meaning_here_are_refused(model, tokenizer, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tokenizer, tmp_path, **kwargs)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_of_logits_are_refused(model, tokenizer, tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be None, but got "):
        BD3LMSFTTrainer(model, arguments(tmp_path), train_dataset=Dataset.from_list(TEXTS), **{name: print})


def test_models_collators_and_adapters_of_other_kinds_are_refused(model, tokenizer, tmp_path):
    given = {"args": arguments(tmp_path), "train_dataset": Dataset.from_list(TEXTS), "processing_class": tokenizer}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="`model` must be a block diffusion model .* but got a GPT2LMHeadModel"):
        BD3LMSFTTrainer(gpt2, **given)
    with pytest.raises(ValueError, match="`data_collator` must be None, but got BD3LMDataCollator"):
        BD3LMSFTTrainer(model, data_collator=BD3LMDataCollator(0), **given)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="`peft_config` must adapt weights.* but got a PromptTuningConfig"):
        BD3LMSFTTrainer(model, peft_config=prompts, **given)


def test_without_trl_the_import_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "bd3lm_hf.training.sft")
    with pytest.raises(ImportError, match=r"pip install 'bd3lm-hf\[trl\]'"):
        import_module("bd3lm_hf.training.sft")
