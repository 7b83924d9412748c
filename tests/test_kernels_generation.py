"""`generate` by the kernels of a CPU gives the tokens of the plain model, and leaves nothing on it."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import random_model
from kernel_cases import (  # noqa: F401
    SETTINGS,
    attached_kernels,
    attributes_of,
    during_generate,
    generating_model,
    recorded_calls,
)

from bd3lm_hf import kernels
from bd3lm_hf.kernels import cpu_generation


GENERATION = {
    "one_row": {},
    "confidence": {"sampler": "confidence", "denoising_steps": 2, "do_sample": False},
    "nucleus": {"top_p": 0.8},
    "static_cache": {"cache_implementation": "static"},
    "without_cache": {"use_cache": False},
    "guidance": {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("setting", ["default", "without_adaln", "noise_level_per_token", "window"])
@pytest.mark.parametrize("arguments", GENERATION)
def test_generate_draws_the_tokens_of_the_plain_model(setting, arguments, calls):
    model = random_model(attn_implementation="sdpa", eos_token_id=None, pad_token_id=0, **SETTINGS[setting])
    prompts = torch.randint(22, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])

    def generate():
        return model.generate(prompts, attention_mask=mask, seed=7, max_new_tokens=40, **GENERATION[arguments])

    found = generate()
    assert ("PackedLayer" in calls) == (setting != "noise_level_per_token")
    with kernels.detached():
        assert torch.equal(found, generate())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_checkpoints_made_during_generate_are_plain(copied, calls):
    model = generating_model()
    attributes, keys, size = attributes_of(model), model.state_dict().keys(), len(pickle.dumps(model))
    other, found, state, found_size = during_generate(
        model, lambda: (copied(model), attributes_of(model), model.state_dict(), len(pickle.dumps(model)))
    )
    assert "PackedLayer" in calls
    assert found == attributes == attributes_of(other) == attributes_of(model)
    assert state.keys() == keys and abs(found_size - size) < 1000
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_other_threads_and_other_passes_see_no_packed_weights(calls):
    model = generating_model()

    def look():
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cpu_generation.packed_weights()))
        thread.start()
        thread.join()
        calls.clear()
        with torch.enable_grad():
            model(torch.tensor([[1, 2]])).logits.sum().backward()
        return seen, list(calls)

    assert cpu_generation.packed_weights() is None
    seen, names = during_generate(model, look)
    assert seen == [None] and "MLP" in names and "PackedLayer" not in names


@pytest.mark.parametrize("few", ["MAX_PACKED_ROWS", "MAX_PACKED_BYTES"])
def test_weights_are_not_packed_where_that_does_not_pay(few, monkeypatch, calls):
    monkeypatch.setattr(cpu_generation, few, 3)
    during_generate(generating_model(), lambda: None)
    assert "PackedLayer" not in calls


def test_short_texts_are_not_worth_packing_for(calls):
    generating_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert "PackedLayer" not in calls
