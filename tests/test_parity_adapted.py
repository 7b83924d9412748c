"""
What the code of three published families of adapted networks (SDAR, Fast-dLLM v2, dLLM A2D) computes, to 1e-4: their
folders load as they are, score, train and write what they scored, trained and wrote there.
"""

import copy
from functools import lru_cache

import pytest
import torch
from conftest import DEVICE, load_tensors
from transformers import DynamicCache

from bd3lm_hf import BlockDiffusionForMaskedLM, CommitCache


ATOL = 1e-4
SDAR = ("sdar_block4", "sdar_block8_tied_bias")
FAST_DLLM = ("fast_dllm_v2_block4_tied", "fast_dllm_v2_block8")
A2D = ("a2d_llama_block8", "a2d_qwen3_block4_tied")
ALL = (*SDAR, *FAST_DLLM, *A2D)


@lru_cache
def read_case(folder, attn_implementation, **kwargs):
    """(model, expected tensors) of a case, which nobody changes."""
    expected = load_tensors(folder / "expected.safetensors")
    # What the family's config.json does not say.
    kwargs |= {} if folder.name in SDAR else {"mask_token_id": int(expected["mask_token_id"])}
    kwargs |= {"block_size": int(expected["block_size"])} if folder.name in A2D else {}
    model = BlockDiffusionForMaskedLM.from_pretrained(folder, attn_implementation=attn_implementation, **kwargs)
    assert model.config.block_size == expected["block_size"]
    assert model.config.mask_token_id == expected["mask_token_id"]
    # Their samplers, as they were run, know no end of a text.
    model.generation_config.eos_token_id = None
    return model.to(DEVICE).eval(), expected


@pytest.fixture(params=["eager", "sdpa"])
def attn_implementation(request):
    return request.param


@pytest.fixture
def load(find_parity_folder, attn_implementation):
    """Function (name, arguments) -> (model in eval mode, expected tensors)."""

    def load_case(name, **kwargs):
        folder = find_parity_folder(name, "parity_adapted")
        return copy.deepcopy(read_case(folder, attn_implementation, **kwargs))

    return load_case


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def with_next(ids):
    """The ids [batch, length] and one token more, which opens a block that these do not see."""
    return torch.cat([ids, torch.full_like(ids[:, :1], 5)], dim=1)


def outputs_at_positions(model, logits):
    """From scores of the tokens [batch, length + 1] to what the network gives at their positions [batch, length]."""
    return logits[:, 1:] if model.config.shift_logits else logits[:, :-1]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits(load, name):
    model, expected = load(name)
    logits = model(input_ids=with_next(expected["input_ids"])).logits
    assert_near(outputs_at_positions(model, logits), expected["logits"])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_of_a_cached_block(load, name):
    model, expected = load(name)
    size, ids = model.config.block_size, expected["input_ids"]
    cache = DynamicCache()
    model(input_ids=ids[:, : 2 * size], cache=cache, use_cache=True)
    logits = model(input_ids=with_next(ids[:, 2 * size :]), cache=CommitCache(cache, 0), use_cache=True).logits
    assert_near(outputs_at_positions(model, logits), expected["cached_block_logits"])
    if model.config.shift_logits:
        assert_near(logits[:, :size], expected["cached_block_logits_shifted"])


@pytest.mark.parametrize("name", FAST_DLLM)
@torch.no_grad()
def test_logits_of_the_token_after_the_prompt(load, name):
    model, expected = load(name)
    ids = expected["input_ids"][:, : 2 * model.config.block_size]
    assert_near(model(input_ids=with_next(ids)).logits[:, -1], expected["prefill_last_logits"])


@pytest.mark.parametrize("name", FAST_DLLM)
@torch.no_grad()
def test_logits_of_a_sub_block_on_old_keys_and_values_of_the_rest(load, name, attn_implementation):
    model, expected = load(name)
    size, ids, part = model.config.block_size, expected["input_ids"], expected["sub_block_ids"]
    start, width = int(expected["sub_block_start"]), part.shape[1]
    cache = DynamicCache()
    model(input_ids=ids[:, : 2 * size], cache=cache, use_cache=True)
    # The whole block with its masks, as the family caches it, of which the part is computed anew.
    block = ids[:, 2 * size :].clone()
    model(input_ids=block, cache=cache, use_cache=True)
    first = 2 * size + start
    visible = torch.ones(1, 1, width, 3 * size + width, dtype=torch.bool)
    visible[..., first : first + width] = False
    mask = visible if attn_implementation == "sdpa" else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    # One position more to read what the last one says.
    mask, ids = torch.cat([mask, mask[:, :, :1]], dim=2), with_next(part)
    hidden = (0, 1, 0, 0)
    value = False if attn_implementation == "sdpa" else -torch.inf
    mask = torch.nn.functional.pad(mask, hidden, value=value)
    positions = torch.arange(first, first + width + 1)[None]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True).logits
    assert_near(outputs_at_positions(model, logits), expected["sub_block_logits"])


@pytest.mark.parametrize("name", A2D)
@torch.no_grad()
def test_logits_without_blocks(load, name):
    model, expected = load(name)
    model.config.block_size = expected["input_ids"].shape[1]
    assert_near(model(input_ids=expected["input_ids"]).logits, expected["bidirectional_logits"])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_of_the_training_pass(load, name):
    model, expected = load(name)
    x_t, x_0 = with_next(expected["x_t"]), with_next(expected["x_0"])
    # In training mode Fast-dLLM v2 reads the first token of a block in the noised one before it. There is no dropout.
    logits = model.train()(input_ids=x_t, clean_input_ids=x_0).logits
    assert_near(outputs_at_positions(model, logits), expected["two_stream_logits"])


@pytest.mark.parametrize("name", (*SDAR, *A2D))
def test_loss_weighted_by_the_noise_over_all_labels(load, name):
    model, expected = load(name)
    model.train()
    weights = expected["loss_weight"] if name in A2D else 1 / expected["p_mask"]
    if name in A2D:
        assert_near(weights, 1 / (expected["t"] + 1e-6))
    x_t, x_0, labels = expected["x_t"], expected["x_0"], expected["labels"]
    weights = weights[:, None].expand(x_t.shape)
    loss = model(input_ids=x_t, clean_input_ids=x_0, labels=labels, loss_weights=weights).loss
    assert_near(loss.detach(), expected["loss"])


@pytest.mark.parametrize("name", FAST_DLLM)
def test_mean_loss_of_masked_tokens_and_their_complement(load, name):
    model, expected = load(name)
    model.train()
    x_t, x_0, labels = expected["x_t"], expected["x_0"], expected["labels"]
    scored = (x_t == model.config.mask_token_id) & (labels != -100)
    scored[:, 0] = False
    noise = {"input_ids": x_t, "clean_input_ids": x_0, "loss_weights": torch.ones(x_t.shape)}
    loss = model(**noise, labels=labels, num_items_in_batch=scored.sum()).loss
    assert_near(loss.detach(), expected["loss"])
    # Both maskings as copies in one row.
    copies = {"input_ids": torch.cat([x_t[:2], x_t[2:]], dim=1), "clean_input_ids": x_0[:2]}
    copies["loss_weights"] = torch.ones(copies["input_ids"].shape)
    loss = model(**copies, labels=labels[:2], num_items_in_batch=scored.sum()).loss
    assert_near(loss.detach(), expected["loss"])


# How SDAR's arguments are called here; its `top_k=1` is greedy, and with that all its confidences are 1.
SDAR_DECODING = {
    "low_confidence_static": {"sampler": "confidence", "tokens_per_step": 1, "do_sample": False},
    "low_confidence_dynamic": {"sampler": "confidence", "tokens_per_step": 1, "do_sample": False},
    "sequential": {"sampler": "sequential", "tokens_per_step": 1, "do_sample": False},
    "one_step": {
        "sampler": "confidence",
        "confidence": "processed_probability",
        "confidence_threshold": 0.85,
        "do_sample": True,
        "top_k": 1,
    },
}


@pytest.mark.parametrize("name", SDAR)
@pytest.mark.parametrize("decoding", SDAR_DECODING)
def test_what_sdar_writes(load, name, decoding):
    model, expected = load(name)
    arguments = dict(SDAR_DECODING[decoding])
    if decoding == "low_confidence_dynamic":
        arguments["confidence_threshold"] = float(expected["generate_threshold"])
    prompt, wanted = expected["generate_prompt"], expected[f"generated_{decoding}"]
    written = model.generate(prompt, max_new_tokens=wanted.shape[1] - prompt.shape[1], **arguments)
    assert written.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", FAST_DLLM)
@pytest.mark.parametrize("decoding", ["generated", "generated_one_by_one", "generated_from_aligned_prompt"])
def test_what_fast_dllm_writes(load, name, decoding):
    model, expected = load(name)
    size, wanted = model.config.block_size, expected[decoding]
    prompt = expected["x_0"][:1, : 2 * size] if "aligned" in decoding else expected["generate_prompt"]
    written = model.generate(
        prompt,
        max_new_tokens=wanted.shape[1] - prompt.shape[1],
        do_sample=False,
        sampler="confidence",
        confidence_threshold=1 if "one_by_one" in decoding else float(expected["generate_threshold"]),
        sub_block_size=int(expected["generate_small_block_size"]),
    )
    assert wanted[:, : prompt.shape[1]].tolist() == prompt.tolist()
    assert written.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", A2D)
@pytest.mark.parametrize("decoding", ["generated", "generated_half_steps", "generated_right_shift"])
def test_what_a2d_writes_in_a_batch_and_alone(load, name, decoding):
    model, expected = load(name, **({"shift_logits": True} if "shift" in decoding else {}))
    size, wanted, pad = model.config.block_size, expected[decoding], int(expected["pad_token_id"])
    prompts = [expected["generate_prompt_0"], expected["generate_prompt_1"]]
    arguments = {
        "max_new_tokens": 2 * size,
        "do_sample": False,
        "sampler": "confidence",
        "denoising_steps": size // 2 if "half" in decoding else size,
        "new_block": True,
    }
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    batch = torch.stack([torch.nn.functional.pad(p, (n, 0), value=pad) for p, n in zip(prompts, padding)])
    real = torch.arange(width) >= torch.tensor(padding)[:, None]
    written = model.generate(batch, attention_mask=real.long(), **arguments)
    assert written.tolist() == wanted[:, -written.shape[1] :].tolist()
    for prompt, row in zip(prompts, wanted):
        alone = model.generate(prompt[None], **arguments)
        assert alone[0].tolist() == row[-alone.shape[1] :].tolist()
