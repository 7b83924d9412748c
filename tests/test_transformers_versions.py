"""Both ends of the range of Transformers: the cache under both of its names, and no deprecated call of ours."""

import logging
import warnings

import pytest
import torch
from conftest import random_model
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments, pipeline

from bd3lm_hf import (
    BD3LMForMaskedLM,
    BD3LMModel,
    BD3LMTrainer,
    BD3LMTrainingArguments,
    CommitCache,
    evaluate_likelihood,
    train_tokenizer,
)


IDS = torch.arange(8).view(1, 8)
NAMES = ("cache", "past_key_values")
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def columns():
    """Function that gives a model, of whose network the list that comes back tells the columns of each forward."""

    def columns(model):
        widths = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return widths

    return columns


# the cache and its two names


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [BD3LMModel, BD3LMForMaskedLM])
def test_a_forward_takes_the_cache_under_both_names_and_shows_it_under_both(kind, name):
    model = random_model()
    model = model if kind is BD3LMForMaskedLM else model.model
    cache = DynamicCache(config=model.config)
    output = model(IDS[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    model(IDS[:, 4:], **{name: CommitCache(cache, 0)})
    assert cache.get_seq_length() == 4
    for shown in NAMES:
        assert getattr(output, shown) is output[shown] is output.get(shown) is cache
        assert shown in output
    assert output.to_tuple()[1] is cache and list(output)[1:] == ["cache"]
    made = model(IDS, use_cache=True)
    assert made.cache is made.past_key_values is made["past_key_values"] and made.cache.get_seq_length() == 8


def test_without_a_cache_neither_name_is_there():
    for output in (random_model()(IDS), random_model().model(IDS)):
        for name in NAMES:
            assert getattr(output, name) is None and output.get(name) is None and name not in output
            with pytest.raises(KeyError):
                output[name]


def test_both_names_at_once_are_refused():
    model = random_model()
    both = {name: DynamicCache(config=model.config) for name in NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are one argument, but got both"):
            call(IDS, **both)
    both["cache"] = None
    assert model(IDS, **both).cache is both["past_key_values"]
    assert model(IDS, cache=None, past_key_values=None).cache is None


def test_generate_takes_and_returns_the_cache_under_both_names(columns):
    arguments = {"max_new_tokens": 16, "return_dict_in_generate": True, **GREEDY}
    expected = random_model().generate(IDS, **arguments)
    for name in NAMES:
        model, cache = random_model(), DynamicCache()
        widths = columns(model)
        output = model.generate(IDS, **arguments, **{name: cache})
        assert torch.equal(output.sequences, expected.sequences)
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"] is cache
        assert cache.get_seq_length() == 20 and max(widths[1:]) <= 8
        # What was read before is not read again.
        widths.clear()
        model.generate(output.sequences, max_new_tokens=4, **GREEDY, **{name: cache})
        assert max(widths) <= 8


def test_generate_uses_its_cache_by_default(columns):
    """A token costs the columns of its block, and each block once those of the block before; else the whole text."""
    model = random_model()
    widths, block_size = columns(model), model.config.block_size
    for use_cache in (None, True, False):
        widths.clear()
        model.generate(IDS, max_new_tokens=48, use_cache=use_cache, **GREEDY)
        mean = sum(widths) / len(widths)
        assert len(widths) == 48
        if use_cache is False:
            assert mean > 8 + 24
        else:
            assert block_size < mean <= block_size + 1 + 8 / 48


# deprecations


@pytest.fixture
def no_deprecation():
    """Makes errors of warnings of deprecation, and of what Transformers logs of it."""
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.Logger.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        yield logged
    logger.removeHandler(handler)
    assert [message for message in logged if "deprecated" in message or "will be removed" in message] == []


def test_the_guard_sees_what_transformers_logs_and_warns_of(no_deprecation):
    """The negative control, and that the old name of the cache is no matter of Transformers' here."""
    model = random_model()
    assert model(IDS, past_key_values=DynamicCache()).past_key_values.get_seq_length() == 8
    model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=4, **GREEDY)
    assert no_deprecation == []
    for logger in ("transformers", "transformers.utils.generic"):
        logging.getLogger(logger).warning_once("`old` is deprecated.")
    assert len(no_deprecation) == 2
    no_deprecation.clear()
    with pytest.raises(FutureWarning):
        warnings.warn("gone tomorrow", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_forward_loss_and_generate_call_nothing_deprecated(no_deprecation, attn_implementation):
    model = random_model(attn_implementation=attn_implementation)
    cache = model(IDS, use_cache=True).cache
    model(IDS, cache=CommitCache(cache, 0))
    model(IDS, output_hidden_states=True, output_attentions=attn_implementation == "eager")
    model.train()(IDS, labels=IDS).loss.backward()
    model.eval()
    for arguments in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_return_sequences": 2, "temperature": 0.7, "top_p": 0.9, "seed": 0},
        {"sampler": "confidence", "return_dict_in_generate": True, "output_reveal": True, "output_scores": True},
        {"guidance_scale": 1.5},
    ):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, pad_token_id=0, **arguments)


def test_saving_loading_pipelines_and_evaluation_call_nothing_deprecated(no_deprecation, tmp_path):
    text = "def main(argv):\n    return 0\n" * 3
    tokenizer = train_tokenizer({"text": [text]}, 290)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    random_model(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind in (BD3LMForMaskedLM, AutoModelForCausalLM):
        model = kind.from_pretrained(tmp_path, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    model.resize_token_embeddings(len(tokenizer))
    parts = {"model": model, "tokenizer": tokenizer, "device": "cpu"}
    # Given as an argument, the pipeline of Transformers 5.17 itself would pass it on in a deprecated way.
    model.generation_config.max_new_tokens = 4
    pipeline("text-generation", **parts)("def")
    pipeline("text-infilling", **parts)("def [MASK](")
    evaluate_likelihood(model, [tokenizer(text)["input_ids"]], num_draws=1, progress=False)


@pytest.mark.parametrize("kind", [Trainer, BD3LMTrainer])
def test_a_training_run_calls_nothing_deprecated(no_deprecation, kind, tmp_path):
    model = random_model()
    arguments = BD3LMTrainingArguments if kind is BD3LMTrainer else TrainingArguments
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    trainer = kind(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=2,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            report_to=[],
            use_cpu=True,
            per_device_eval_batch_size=4,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model(tmp_path / "saved")
