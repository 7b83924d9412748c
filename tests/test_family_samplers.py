"""The decoding of published families, by arguments of `generate`: quotas, sub-blocks, left to right, a new block."""

import pytest
import torch
from conftest import DEVICE
from transformers import DynamicCache, LlamaConfig, Qwen3Config

from bd3lm_hf import BD3LMGenerationConfig, BlockDiffusionConfig, BlockDiffusionForMaskedLM, ConfidenceSampler
from bd3lm_hf.modeling.samplers_block_diffusion import BlockNoise, SequentialSampler


MASK = 30


def make_model(block_size=8, shift_logits=False, config_class=LlamaConfig, **fields):
    """A tiny adapted network whose random weights say something."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"head_dim": 8} if config_class is Qwen3Config else {}
    text_config = config_class(vocab_size=31, num_key_value_heads=2, max_position_embeddings=128, **sizes, **more)
    config = BlockDiffusionConfig(
        text_config=text_config, block_size=block_size, mask_token_id=MASK, shift_logits=shift_logits, **fields
    )
    torch.manual_seed(3)
    model = BlockDiffusionForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.eos_token_id = None
    return model.to(DEVICE).eval()


def prompt_of(length, seed=0):
    return torch.randint(0, 30, (1, length), generator=torch.Generator().manual_seed(seed))


def revealed_by_sdar(confidence, masked, quota, threshold=None):
    """The published rule (JetAstra/SDAR), of one block: which positions a step reveals."""
    left = [index for index in range(len(masked)) if masked[index]]
    ranked = sorted(left, key=lambda index: -confidence[index])
    above = [index for index in left if threshold is not None and confidence[index] > threshold]
    return sorted(above if len(above) >= quota else ranked[:quota])


@pytest.mark.parametrize("quota", [1, 2, 3, 8])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.7])
def test_a_quota_reveals_what_sdar_reveals(quota, threshold):
    generator = torch.Generator().manual_seed(quota)
    for _ in range(50):
        confidence = torch.rand(1, 8, generator=generator)
        masked = torch.rand(1, 8, generator=generator) < 0.6
        sampler = ConfidenceSampler(tokens_per_step=quota, confidence_threshold=threshold)
        revealed = sampler.reveal(masked, confidence.masked_fill(~masked, -torch.inf))
        expected = revealed_by_sdar(confidence[0].tolist(), masked[0].tolist(), quota, threshold)
        assert revealed[0].nonzero()[:, 0].tolist() == expected


def test_left_to_right_takes_the_first_masked_tokens():
    masked = torch.tensor([[False, True, True, False, True, True]])
    step = SequentialSampler(tokens_per_step=2)
    assert step.confidence is None
    assert step.reveal(masked, None).tolist() == [[False, True, True, False, False, False]]
    halves = SequentialSampler(denoising_steps=2)
    halves.start(masked, BlockNoise(None, [0], masked.shape, masked.device))
    first = halves.reveal(masked, None)
    assert first.tolist() == [[False, True, True, False, False, False]]
    assert halves.reveal(masked & ~first, None).tolist() == [[False, False, False, False, True, True]]


def reveal_steps(model, prompt, num_new, **arguments):
    output = model.generate(
        prompt,
        max_new_tokens=num_new,
        do_sample=False,
        return_dict_in_generate=True,
        output_reveal=True,
        **arguments,
    )
    return output.reveal_steps[0, prompt.shape[1] :].tolist(), output


@pytest.mark.parametrize("shift_logits", [False, True])
def test_sub_blocks_are_denoised_from_left_to_right_after_the_first_token(shift_logits):
    model = make_model(shift_logits=shift_logits)
    arguments = {"sampler": "confidence", "sub_block_size": 4, "tokens_per_step": 2}
    steps, _ = reveal_steps(model, prompt_of(8), 16, **arguments)
    for start in (0, 8):
        block = steps[start : start + 8]
        # One token, then three in two steps, then four in two steps.
        assert block[0] == min(block) and block.count(block[0]) == 1
        assert sorted(step - block[0] for step in block[1:4]) == [1, 1, 2]
        assert sorted(step - block[0] for step in block[4:]) == [3, 3, 4, 4]
    # Where the prompt ends inside the block, its first token is known.
    steps, _ = reveal_steps(model, prompt_of(10), 6, **arguments)
    assert sorted(steps[:2]) == [1, 1] and sorted(steps[2:]) == [2, 2, 3, 3]


def test_the_first_token_is_known_when_the_rest_of_its_block_is_predicted():
    # So decodes Fast-dLLM v2; without sub-blocks the most confident token may come before the first one.
    model = make_model(shift_logits=True)
    prompt = prompt_of(8)
    steps, _ = reveal_steps(model, prompt, 8, sampler="confidence", confidence_threshold=1.0, sub_block_size=8)
    assert steps[0] == 1 and sorted(steps) == list(range(1, 9))
    orders = [
        reveal_steps(model, prompt_of(8, seed), 8, sampler="confidence", confidence_threshold=1.0)[0]
        for seed in range(5)
    ]
    assert any(order[0] > 1 for order in orders)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("shift_logits", [False, True])
def test_a_new_block_begins_after_each_prompt_of_a_batch(config_class, shift_logits):
    model = make_model(4, shift_logits, config_class)
    arguments = {"max_new_tokens": 10, "do_sample": False, "sampler": "confidence", "new_block": True}
    prompts = [prompt_of(length, length) for length in (3, 8, 6, 1)]
    alone = [model.generate(prompt, **arguments)[0, -10:].tolist() for prompt in prompts]
    batch = torch.cat([torch.nn.functional.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in prompts])
    real = torch.arange(8)[None] >= torch.tensor([[8 - prompt.shape[1]] for prompt in prompts])
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        written = model.generate(batch, attention_mask=real.long(), **arguments, **more)
        assert written[:, -10:].tolist() == alone, more
    # Of a prompt of whole blocks it is the next block anyway, of others it is not.
    plain = [model.generate(prompt, **{**arguments, "new_block": False})[0, -10:].tolist() for prompt in prompts]
    assert plain[1] == alone[1] and plain != alone


def test_a_new_block_sees_the_prompt_as_blocks_that_end_with_it():
    # The reference: one pass over all tokens under a mask whose blocks are counted from the end of the prompt.
    model, prompt = make_model(4), prompt_of(6)
    _, output = reveal_steps(model, prompt, 4, sampler="confidence", denoising_steps=1, new_block=True)
    ids = torch.cat([prompt, torch.full((1, 4), MASK)], dim=1)
    block = (torch.arange(10) + 2) // 4
    visible = (block[None] <= block[:, None])[None, None]
    logits = model(input_ids=ids, attention_mask=visible, position_ids=torch.arange(10)[None]).logits[:, 6:]
    logits[..., MASK] = -torch.inf
    assert output.sequences[:, 6:].tolist() == logits.argmax(-1).tolist()


def test_a_cache_of_other_blocks_is_not_gone_on_with():
    model, prompt = make_model(4), prompt_of(6)
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(prompt, new_block=True, cache=DynamicCache(), **arguments)
    with pytest.raises(ValueError, match="`cache` that `generate` returned must hold what it held then"):
        model.generate(output.sequences, cache=output.cache, **arguments)
    output = model.generate(prompt, **arguments)
    with pytest.raises(
        ValueError, match="`new_block` must be False with .* a `cache` that is not empty, but got True"
    ):
        model.generate(output.sequences, cache=output.cache, new_block=True, **arguments)


def test_a_new_block_goes_with_neither_gaps_nor_guidance():
    model, prompt = make_model(4), prompt_of(6)
    with pytest.raises(ValueError, match="`new_block` must be False with `infill`"):
        model.generate(prompt, new_block=True, infill=True, max_new_tokens=4)
    with pytest.raises(ValueError, match="`new_block` must be False with .*a `guidance_scale`"):
        model.generate(prompt, new_block=True, guidance_scale=2.0, max_new_tokens=4)


def test_the_confidence_may_be_of_what_the_processors_leave():
    # With one token left each has the probability 1, so that a block is revealed at once.
    model, prompt = make_model(), prompt_of(8)
    arguments = {"sampler": "confidence", "confidence_threshold": 0.85, "do_sample": True, "top_k": 1}
    count = {}
    for confidence in ("probability", "processed_probability"):
        output = model.generate(
            prompt, max_new_tokens=8, confidence=confidence, return_dict_in_generate=True, **arguments
        )
        count[confidence] = int(output.num_forward_passes)
    assert count["processed_probability"] == 1 < count["probability"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_step": 0}, "`tokens_per_step` must be an integer >= 1, but got 0"),
        ({"tokens_per_step": 2, "denoising_steps": 4}, "`denoising_steps` must be None with `tokens_per_step`"),
        ({"sub_block_size": 0, "tokens_per_step": 1}, "`sub_block_size` must be an integer >= 1, but got 0"),
        ({"sub_block_size": 4}, "`sub_block_size` must go with `confidence_threshold` or `tokens_per_step`"),
        ({"sub_block_size": 4, "denoising_steps": 4}, "`sub_block_size` must go with"),
        ({"new_block": 1}, "`new_block` must be True or False, but got 1"),
    ],
)
def test_what_excludes_itself_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BD3LMGenerationConfig(sampler="confidence", **arguments)


def test_arguments_of_another_sampler_are_refused():
    model = make_model(4)
    for sampler, name in (("first_hitting", "tokens_per_step"), ("sequential", "confidence")):
        with pytest.raises(ValueError, match=f"`{name}` is an argument of the sampler 'confidence'"):
            value = "margin" if name == "confidence" else 2
            model.generate(prompt_of(4), max_new_tokens=4, sampler=sampler, **{name: value})
