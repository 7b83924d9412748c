"""Bad input: each error names the argument, what it got and what it takes, before any work is spent."""

import re

import pytest
import torch
from conftest import DEVICE, random_model, tiny_config
from transformers import DynamicCache, StaticCache

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMGenerationConfig
from bd3lm_hf.modeling.diffusion_block_diffusion import sample_timesteps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 10, "num_attention_heads": 3},
            "`num_attention_heads` must be a divisor of `hidden_size` (10)",
        ),
        ({"hidden_size": 6, "num_attention_heads": 2}, "must be even for the rotary embedding, but got 6 / 2 = 3"),
        ({"block_size": 0}, "`block_size` must be an integer >= 1, but got 0"),
        ({"block_size": 65}, "`block_size` must be at most `max_position_embeddings` (64), but got 65"),
        ({"vocab_size": "many"}, "`vocab_size` must be an integer >= 1, but got 'many'"),
        ({"mask_token_id": 23}, "`mask_token_id` must be an id inside the vocabulary, 0 <= id < 23, but got 23"),
        ({"noise_schedule": "sine"}, "`noise_schedule` must be one of loglinear, square, square_root, log, cosine"),
        ({"noise_interval": (0.5, 0.2)}, "0 <= beta <= omega <= 1 and omega > 0, but got (0.5, 0.2)"),
        ({"noise_interval": (0.0, 0.0)}, "but got (0.0, 0.0)"),
        ({"noise_interval": (0.5,)}, "`noise_interval` must be a pair (beta, omega)"),
        ({"hidden_dropout": 1.0}, "`hidden_dropout` must be a probability in [0, 1), but got 1.0"),
        ({"causal": True}, "`causal` must be false"),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**fields)


def test_a_block_size_that_the_checkpoint_was_not_trained_for_is_refused(tmp_path):
    BD3LMForMaskedLM(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`block_size` must be 4, which this checkpoint was trained for, but got 8"):
        BD3LMForMaskedLM.from_pretrained(tmp_path, block_size=8)
    assert BD3LMForMaskedLM.from_pretrained(tmp_path, block_size=4).config.block_size == 4
    with pytest.raises(ValueError, match="block_size"):
        random_model().generate(torch.tensor([[1]]), block_size=8, max_new_tokens=2)


@pytest.mark.parametrize("fields", [{"model_type": "mdlm"}, {"cross_attn": False, "block_size": 16}])
def test_the_block_size_of_a_masked_diffusion_checkpoint_is_its_length(fields):
    published = {"vocab_size": 23, "hidden_dim": 32, "n_heads": 2, "n_blocks": 2, "model_length": 32, **fields}
    assert BD3LMConfig.from_dict(published, block_size=32).block_size == 32
    with pytest.raises(ValueError, match="`block_size` must be 32, which this checkpoint was trained for, but got 16"):
        BD3LMConfig.from_dict(published, block_size=16)


def test_published_fields_are_refused_without_the_package(monkeypatch):
    monkeypatch.setattr(BD3LMConfig, "read_published_fields", None)
    with pytest.raises(ValueError, match="`hidden_dim` must be `hidden_size`: the package bd3lm_hf reads published"):
        BD3LMConfig(hidden_dim=32)


def test_a_configuration_that_was_changed_can_be_checked_again():
    config = tiny_config()
    config.validate()
    config.block_size = 0
    with pytest.raises(ValueError, match="`block_size` must be an integer >= 1, but got 0"):
        config.validate()


def test_fields_given_on_loading_are_checked_like_those_of_a_new_configuration(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`mask_token_id` must be an id inside the vocabulary"):
        BD3LMConfig.from_pretrained(tmp_path, mask_token_id=500)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sampler": "magic"},
            "`sampler` must be one of first_hitting, ancestral, confidence, sequential, entropy_bound, or a Sampler",
        ),
        ({"sampler": "confidence", "denoising_steps": 0}, "`denoising_steps` must be an integer >= 1, but got 0"),
        ({"sampler": "ancestral", "remask_cap": 1.5}, "`remask_cap` must be a number in [0, 1], but got 1.5"),
        ({"sampler": "ancestral", "remask_cap": "a"}, "`remask_cap` must be a number in [0, 1], but got 'a'"),
        ({"sampler": ["x"]}, "`sampler` must be one of"),
        ({"sampler": "ancestral", "noise_schedule": "sqrt"}, "`noise_schedule` must be one of loglinear, square,"),
        ({"sampler": "confidence", "confidence": "sure"}, "`confidence` must be one of probability, margin,"),
        (
            {"sampler": "entropy_bound", "entropy_bound": -0.1},
            "`entropy_bound` must be a number of nats >= 0, but got -0",
        ),
        ({"entropy_bound": 0.1}, "`entropy_bound` is an argument of the sampler 'entropy_bound', but got 0.1"),
        ({"remask_cap": 0.1}, "`remask_cap` is an argument of the sampler 'ancestral', but got 0.1"),
        (
            {"sampler": "confidence", "confidence_threshold": 0.5, "confidence": "negative_entropy"},
            "`confidence_threshold` is a probability or a margin, but got 0.5 with `confidence` 'negative_entropy'",
        ),
        ({"infill": 1}, "`infill` must be True or False, but got 1"),
        ({"output_reveal": "all"}, "`output_reveal` must be True or False, but got 'all'"),
        (
            {"sampler": "confidence", "confidence_threshold": 0.0},
            "`confidence_threshold` must be in (0, 1], but got 0.0",
        ),
        (
            {"sampler": "confidence", "confidence_threshold": 1.5},
            "`confidence_threshold` must be in (0, 1], but got 1.5",
        ),
        ({"sampler": "confidence", "confidence_threshold": 0.5, "denoising_steps": 2}, "one must be chosen"),
        ({"denoising_steps": 2}, "`denoising_steps` is an argument of the sampler 'ancestral' or 'confidence'"),
        ({"entropy_stop_threshold": -1.0}, "`entropy_stop_threshold` must be a number of nats > 0, but got -1.0"),
        ({"entropy_stop_window": 0}, "`entropy_stop_window` must be an integer >= 1, but got 0"),
        ({"num_beams": 4}, "got arguments of beam sample"),
        (
            {"num_beams": 4, "do_sample": False},
            "got arguments of beam search",
        ),
        ({"prompt_lookup_num_tokens": 3}, "got arguments of assisted"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"synced_gpus": True}, "`synced_gpus` must be False"),
        ({"denoising_stepz": 3}, "denoising_stepz"),
        ({"output_hidden_states": True}, "`output_hidden_states` must be False in `generate`"),
        ({"position_ids": torch.tensor([[0, 1]])}, "takes no ['position_ids']"),
        ({"timesteps": torch.tensor([0.5])}, "takes no ['timesteps']"),
    ],
)
def test_generation_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model().generate(torch.tensor([[1, 2]]), **{"max_new_tokens": 4, **arguments})


def test_a_generation_config_checks_itself():
    with pytest.raises(ValueError, match="`sampler` must be one of"):
        BD3LMGenerationConfig(sampler="magic")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token, but got [1, 0]"),
        ({"input_ids": torch.tensor([[1, 22]])}, "`input_ids` must not hold the mask token (22)"),
        ({"input_ids": torch.tensor([[1, 23]])}, "`input_ids` must be ids in [0, 23), but got 23"),
        ({"input_ids": torch.tensor([[1, -1]])}, "`input_ids` must be ids in [0, 23), but got -1"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)},
            "`attention_mask` must be of the shape of `input_ids`, [1, 2], but got [1, 3]",
        ),
        (
            {"input_ids": torch.tensor([[1, 0], [1, 2]]), "attention_mask": torch.tensor([[1, 0], [1, 1]])},
            "`attention_mask` must be left-padded",
        ),
        (
            {"input_ids": torch.tensor([[0, 0], [1, 2]]), "attention_mask": torch.tensor([[0, 0], [1, 1]])},
            "row 0 is all padding",
        ),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "`generate` needs the prompts in `input_ids`"),
        ({}, "`bos_token_id` has to be defined when no `input_ids` are provided"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model(pad_token_id=0).generate(**inputs, max_new_tokens=4)


def test_right_padding_is_refused_where_the_mask_is_inferred_from_the_ids():
    with pytest.raises(ValueError, match="`attention_mask` must be left-padded"):
        random_model(pad_token_id=0).generate(torch.tensor([[1, 0], [1, 2]]), max_new_tokens=4)


def test_without_a_bos_an_empty_prompt_is_refused_and_with_one_it_is_the_bos():
    sequences = random_model(bos_token_id=7).generate(max_new_tokens=4)
    assert sequences.shape == (1, 5) and sequences[0, 0] == 7


def test_rows_that_end_apart_need_a_padding_token():
    model = random_model()
    prompts = torch.tensor([[3, 5], [7, 9]])
    arguments = {"max_new_tokens": 8, "sampler": "confidence", "do_sample": False}

    class StopFirst:
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] == 4, False])

    with pytest.raises(ValueError, match="`pad_token_id` must be set"):
        model.generate(prompts, stopping_criteria=[StopFirst()], **arguments)


def test_a_cache_that_does_not_fit_the_prompts_is_refused():
    model = random_model()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(6)[None], cache=cache)
    with pytest.raises(ValueError, match="`cache` that no `generate` returned must hold whole blocks"):
        model.generate(torch.arange(9)[None], cache=cache, max_new_tokens=4)


def test_a_static_cache_without_room_is_refused():
    model = random_model()
    prompt = torch.arange(5)[None]
    with pytest.raises(ValueError, match="`cache` must have room for 16 positions.* static cache of 13"):
        cache = StaticCache(config=model.config, max_cache_len=13)
        model.generate(prompt, cache=cache, max_new_tokens=8)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert model.generate(prompt, cache=cache, max_new_tokens=8).shape == (1, 13)


def test_a_cache_of_another_batch_size_is_refused():
    model = random_model()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(4)[None], cache=cache)
    with pytest.raises(ValueError, match="`cache` must be of the batch size .* 2, but got 1"):
        model.generate(torch.arange(5)[None], cache=cache, num_return_sequences=2, max_new_tokens=4)


def test_padding_between_tokens_has_no_loss():
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="`attention_mask` must have the real tokens of each row next to each other"):
        random_model()(ids, labels=ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "inputs_embeds": torch.ones(1, 4, 32)}, "Exactly one of"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)},
            "`attention_mask` must be of shape [batch, cached + length] = [1, 4], but got [1, 5]",
        ),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "clean_input_ids": torch.ones(1, 5, dtype=torch.long)},
            "`clean_input_ids` must be of the shape of `input_ids`, or of each of the noised copies in it, but got [1",
        ),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "document_ids": torch.ones(1, 5, dtype=torch.long)},
            "`document_ids` must be of shape [batch, length] = [1, 4], but got [1, 5]",
        ),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 5, dtype=torch.long)},
            "`labels` must be of the shape of `input_ids`, [1, 4], but got [1, 5]",
        ),
        (
            {"input_ids": torch.full((1, 4), 22), "labels": torch.full((1, 4), 22)},
            "`labels` must not hold the mask token (22)",
        ),
        (
            {"inputs_embeds": torch.ones(1, 4, 32), "labels": torch.ones(1, 4, dtype=torch.long)},
            "`labels` and `clean_input_ids` go with `input_ids`, but got `inputs_embeds`",
        ),
    ],
)
def test_arguments_of_forward_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model()(**arguments)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_training_under_flex_attention_on_a_cpu_names_the_way_out():
    model = random_model(attn_implementation="flex_attention").train()
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="to train on a CPU, but got 'flex_attention', which has no backward pass"):
        model(ids, labels=ids)


def test_an_interval_given_to_a_draw_is_checked():
    with pytest.raises(ValueError, match="`noise_interval` must be a pair"):
        sample_timesteps(2, 3, (0.9, 0.1))


def test_a_truncated_file_is_the_librarys_own_error(tmp_path):
    BD3LMForMaskedLM(tiny_config()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)safetensor|incomplete|invalid|header"):
        BD3LMForMaskedLM.from_pretrained(tmp_path)
