"""The published implementation's own outputs, to 1e-4: its checkpoints load, and compute what they computed there."""

import pytest
import torch
from conftest import DEVICE, load_tensors
from transformers import DynamicCache

from bd3lm_hf import BD3LMForMaskedLM, CommitCache
from bd3lm_hf.modeling.diffusion_block_diffusion import NOISE_SCHEDULES, subs_log_probs


ATOL = 1e-4
TWO_STREAM = ("bd3lm_block1", "bd3lm_block4", "bd3lm_block8_no_adaln", "bd3lm_block16_time_conditioned")
# Every shape that FlexAttention meets is compiled anew, for many seconds: one checkpoint goes through the compiled
# kernel, and what meets many shapes, or other checkpoints, through the same mask function uncompiled.
# Transformers' FlexAttention does not compile for a CPU.
COMPILED = "bd3lm_block4" if DEVICE.type == "cuda" else None


@pytest.fixture(params=["eager", "sdpa", "flex_attention"])
def attn_implementation(request):
    return request.param


@pytest.fixture
def load(find_parity_folder, attn_implementation, request):
    """Function folder name -> (model in eval mode, expected tensors)."""

    def load_folder(name, compiled=COMPILED):
        if attn_implementation == "flex_attention" and name != compiled:
            request.getfixturevalue("uncompiled_flex_attention")
        folder = find_parity_folder(name)
        model = BD3LMForMaskedLM.from_pretrained(folder, attn_implementation=attn_implementation)
        assert model.config._attn_implementation == attn_implementation
        return model.to(DEVICE).eval(), load_tensors(folder / "expected.safetensors")

    return load_folder


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", TWO_STREAM)
@torch.no_grad()
def test_two_stream_logits(load, name):
    model, expected = load(name)
    logits = model(input_ids=expected["xt"], clean_input_ids=expected["x0"], timesteps=expected["timesteps"]).logits
    assert_near(logits, expected["logits"])


@torch.no_grad()
def test_masked_diffusion_logits(load):
    model, expected = load("mdlm")
    assert model.config.block_size == model.config.max_position_embeddings == 32
    assert_near(model(input_ids=expected["xt"], timesteps=expected["timesteps"]).logits, expected["logits"])


@torch.no_grad()
def test_the_two_stream_pass_of_one_block_is_the_plain_one(load):
    model, expected = load("mdlm")
    logits = model(input_ids=expected["xt"], clean_input_ids=expected["x0"]).logits
    assert_near(logits, expected["logits"])


@pytest.mark.parametrize("name", TWO_STREAM)
@torch.no_grad()
def test_block_causal_logits(load, name):
    model, expected = load(name)
    logits = model(input_ids=expected["block_causal_input"], timesteps=expected["timesteps"]).logits
    assert_near(logits, expected["block_causal_logits"])


@pytest.mark.parametrize("name", TWO_STREAM)
@torch.no_grad()
def test_cached_logits_past_the_window(load, name):
    model, expected = load(name, compiled=None)
    size = model.config.block_size
    assert expected["cached_clean"].shape[1] > model.config.max_position_embeddings
    cache, logits = DynamicCache(), []
    blocks = zip(
        expected["cached_noised"].split(size, dim=1), expected["cached_clean"].split(size, dim=1), strict=True
    )
    for b, (noised, clean) in enumerate(blocks):
        common = {"timesteps": expected["timesteps"], "use_cache": True}
        logits.append(model(input_ids=noised, cache=CommitCache(cache, 0), **common).logits)
        assert cache.get_seq_length() == b * size, "a denoising pass must write nothing"
        model(input_ids=clean, cache=cache, **common)
    assert_near(torch.cat(logits, dim=1), expected["cached_logits"])


@pytest.mark.parametrize("name", TWO_STREAM)
@torch.no_grad()
def test_merged_commit_and_denoise_pass_past_the_window(load, name):
    model, expected = load(name, compiled=None)
    size = model.config.block_size
    noised = expected["cached_noised"].split(size, dim=1)
    clean = expected["cached_clean"].split(size, dim=1)
    cache, logits = DynamicCache(), []
    for b in range(len(noised)):
        merged = noised[b] if b == 0 else torch.cat([clean[b - 1], noised[b]], dim=1)
        committing = CommitCache(cache, 0 if b == 0 else size)
        passed = model(input_ids=merged, cache=committing, timesteps=expected["timesteps"], use_cache=True).logits
        logits.append(passed[:, -size:])
        assert cache.get_seq_length() == b * size
    assert_near(torch.cat(logits, dim=1), expected["cached_logits"])


@pytest.mark.parametrize("name", (*TWO_STREAM, "mdlm"))
@torch.no_grad()
def test_log_probs_and_nelbo_per_token(find_parity_folder, name):
    folder = find_parity_folder(name)
    model = BD3LMForMaskedLM.from_pretrained(folder).to(DEVICE).eval()
    expected = load_tensors(folder / "expected.safetensors")
    x_0, x_t, mask_token_id = expected["x0"], expected["xt"], model.config.mask_token_id
    assert mask_token_id == model.config.vocab_size - 1
    streams = {} if name == "mdlm" else {"clean_input_ids": x_0}
    logits = model(input_ids=x_t, timesteps=expected["timesteps"], **streams).logits
    log_probs = subs_log_probs(logits, x_t, mask_token_id).gather(-1, x_0[..., None]).squeeze(-1)
    assert_near(log_probs, expected["log_probs_of_x0"])
    weight = NOISE_SCHEDULES[model.config.noise_schedule].loss_weight(expected["t"])
    assert_near(weight * -log_probs, expected["nelbo_per_token"])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ("bd3lm_block1", "bd3lm_block4", "bd3lm_block8_no_adaln", "mdlm"))
def test_nelbo_of_the_training_pass(load, chosen_draws, name):
    # Without time conditioning sigma is 0, whatever t is: then the training pass meets the file's own numbers.
    model, expected = load(name)
    model.config.ignore_bos = False
    size = model.config.block_size
    chosen_draws(expected["t"][:, ::size], expected["xt"] == model.config.mask_token_id)
    output = model(input_ids=expected["x0"], labels=expected["x0"])
    assert_near(output.token_nelbo, expected["nelbo_per_token"])
    assert_near(output.loss, expected["nelbo_per_token"].mean())
    assert output.logits is None


@pytest.mark.parametrize("name", ("loglinear", "square", "square_root", "log", "cosine"))
def test_noise_schedules(shared_dir, name):
    expected = load_tensors(shared_dir / "parity" / "noise_schedules.safetensors")
    schedule, t = NOISE_SCHEDULES[name], expected["t"]
    assert_near(schedule.mask_probability(t), expected[f"{name}.mask_prob"])
    # Weights reach 1 / eps = 1000, where float32 has no four decimals left.
    torch.testing.assert_close(schedule.loss_weight(t), -expected[f"{name}.loss_scale"], rtol=1e-5, atol=ATOL)
