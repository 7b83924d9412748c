"""A checkpoint that an earlier version of this package wrote still says what it said then."""

from pathlib import Path

import pytest
import torch
from conftest import DEVICE, load_tensors
from transformers import AutoModel, AutoModelForMaskedLM

from bd3lm_hf import BD3LMForMaskedLM, BD3LMGenerationConfig


FOLDER = Path(__file__).parent / "fixtures" / "first_version"


@pytest.fixture(scope="module")
def expected():
    return load_tensors(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    model, info = BD3LMForMaskedLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values())
    return model.to(DEVICE)


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000


def test_the_auto_classes_load_it(model):
    for auto in (AutoModelForMaskedLM, AutoModel):
        loaded = auto.from_pretrained(FOLDER).to(DEVICE)
        for name, tensor in loaded.base_model.state_dict().items():
            assert torch.equal(tensor, model.base_model.state_dict()[name]), name


def test_the_logits_are_those_of_then(model, expected):
    with torch.no_grad():
        logits = model(expected["x_t"], timesteps=expected["sigma"]).logits
        outputs = model(expected["x_t"], clean_input_ids=expected["text"], timesteps=expected["sigma"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.logits, expected["two_stream_logits"], atol=1e-5, rtol=0)


def test_the_bound_under_the_same_noise_is_that_of_then(model, expected, chosen_draws):
    chosen_draws(expected["t"], expected["masked"])
    with torch.no_grad():
        loss = model(expected["text"], labels=expected["text"]).loss
    torch.testing.assert_close(loss, expected["nelbo"], atol=1e-5, rtol=0)


def test_greedy_text_is_that_of_then_under_the_saved_generation_configuration(model, expected):
    config = model.generation_config
    assert isinstance(config, BD3LMGenerationConfig) and config.do_sample is False
    assert (config.sampler, config.denoising_steps) == ("confidence", 2)
    assert (config.entropy_stop_threshold, config.entropy_stop_window) == (0.1, 12)
    assert torch.equal(model.generate(expected["text"][:, :6], max_new_tokens=13), expected["generated"])
