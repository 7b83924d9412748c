"""Infilling: gaps are filled, given tokens stay, and both sides of a gap within its block are read."""

import pytest
import reference
import torch
from conftest import random_model
from test_first_hitting import ALPHA, BATCH_SIZE, EOS, MASK, NUM_SAMPLES, chi_square_p_value, conditionals_of
from test_generation import left_padded, random_prompts


@pytest.fixture
def model():
    return random_model(vocab_size=101, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)


def with_gaps(prompts, gaps):
    """The prompts with the tokens at these positions masked (100)."""
    return [prompt.scatter(0, torch.tensor(gap), 100) for prompt, gap in zip(prompts, gaps)]


# In the middle of a block, over the border of two, a whole block, at the end of the text, and none at all.
GAPS = [[5], [2, 3, 4, 5], [4, 5, 6, 7, 12], [9, 10], []]
LENGTHS = [11, 9, 16, 11, 6]


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "entropy_bound"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_gap_is_filled_and_every_given_token_stays(model, sampler, use_cache):
    prompts = with_gaps(random_prompts(LENGTHS), GAPS)
    inputs = left_padded(prompts)
    filled = model.generate(**inputs, infill=True, sampler=sampler, use_cache=use_cache, seed=2)
    assert filled.shape == inputs["input_ids"].shape
    given = inputs["input_ids"] != 100
    assert torch.equal(filled[given], inputs["input_ids"][given])
    assert not (filled == 100).any()
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], infill=True, sampler=sampler, seed=2 + row)
        assert torch.equal(alone[0], filled[row, -len(prompt) :])


def test_text_can_go_on_behind_the_gaps(model):
    (prompt,) = with_gaps(random_prompts([10]), [[3, 8]])
    text = model.generate(prompt[None], infill=True, max_new_tokens=7, seed=0)
    assert text.shape == (1, 17) and not (text == 100).any()
    filled = model.generate(prompt[None], infill=True, seed=0)
    # Up to the block in which the text goes on, both are filled alike.
    assert torch.equal(text[:, :8], filled[:, :8])
    longer = model.generate(filled[:, :8], max_new_tokens=9, seed=0)
    assert longer.shape == text.shape


def test_only_the_blocks_of_gaps_are_denoised(model):
    (prompt,) = with_gaps(random_prompts([40]), [[21, 30]])
    output = model.generate(prompt[None], infill=True, return_dict_in_generate=True)
    assert output.num_forward_passes.tolist() == [2]


def test_a_gap_is_filled_from_both_sides_with_the_distribution_of_the_reverse_process():
    model = random_model(
        seed=3,
        attn_implementation="sdpa",
        vocab_size=5,
        hidden_size=16,
        block_size=4,
        num_hidden_layers=1,
        eos_token_id=None,
        pad_token_id=EOS,
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    text = (2, 0, 1, 1, 0, MASK, 2, MASK)
    distribution = reference.first_hitting_distribution(conditionals_of(model), text, frozenset({5, 7}))
    torch.manual_seed(0)
    prompts = torch.tensor([text]).expand(BATCH_SIZE, -1)
    mask = torch.ones_like(prompts)
    samples = torch.cat(
        [
            model.generate(prompts, attention_mask=mask, infill=True, suppress_tokens=[EOS])
            for _ in range(NUM_SAMPLES // BATCH_SIZE)
        ]
    )
    assert chi_square_p_value(samples, distribution) > ALPHA


def test_a_mask_token_is_refused_unless_infilling_was_asked_for(model):
    with pytest.raises(ValueError, match="`input_ids` must not hold the mask token .100., which only `infill=True`"):
        model.generate(torch.tensor([[1, 100, 2]]), max_new_tokens=4)
