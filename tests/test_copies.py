"""Several noised copies of a text beside one clean stream: each has the loss that it has in a pass of its own."""

import pytest
import torch
from conftest import random_model

from bd3lm_hf.modeling.attention_block_diffusion import MaskKind, plain_two_stream_mask
from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.sampler import NoiseSampler


NUM_COPIES, LENGTH = 3, 18


def whole_rows(x_0):
    return {}


def left_padding(x_0):
    return {"attention_mask": (torch.arange(LENGTH) >= torch.tensor([[0], [5], [11]])).long()}


def right_padding(x_0):
    return {"attention_mask": (torch.arange(LENGTH) < torch.tensor([[18], [13], [2]])).long()}


def packed_documents(x_0):
    return {"document_ids": (torch.arange(LENGTH) >= torch.tensor([[7], [18], [1]])).long()}


def prompts(x_0):
    # The last row is nothing but prompt.
    return {"labels": x_0.masked_fill(torch.arange(LENGTH) < torch.tensor([[3], [9], [18]]), -100)}


layouts = pytest.mark.parametrize("layout", [whole_rows, left_padding, right_padding, packed_documents, prompts])
implementations = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
pytestmark = pytest.mark.usefixtures("uncompiled_flex_attention")


def noised_batch(model, layout=whole_rows, sampler=None, interval=(0.2, 0.9)):
    """What the model takes for a batch of 3 rows with NUM_COPIES copies, or as `sampler` has it."""
    x_0 = torch.randint(22, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = {"labels": x_0, **layout(x_0)}
    blocks = TextBlocks.of_batch(model.config, x_0, **inputs)
    sampler = sampler or NoiseSampler(num_copies=NUM_COPIES)
    noise = sampler.draw(model.config, interval, x_0, blocks, range(3), 3, (0,))
    return {**inputs, **noise.inputs(x_0), "num_items_in_batch": 7}


def single_copies(batch):
    """The same noise, one copy at a time."""
    num_copies = batch["input_ids"].shape[1] // LENGTH
    for copy in range(num_copies):
        of_copy = {
            name: batch[name][:, copy * LENGTH : (copy + 1) * LENGTH]
            for name in ("input_ids", "loss_weights", "timesteps")
            if name in batch
        }
        yield {**batch, **of_copy}


@layouts
@implementations
@torch.no_grad()
def test_the_loss_is_the_sum_over_passes_with_one_copy_each(attn_implementation, layout):
    model = random_model(0, attn_implementation, max_position_embeddings=16)
    batch = noised_batch(model, layout)
    output, singles = model(**batch), [model(**single) for single in single_copies(batch)]
    assert len(singles) == NUM_COPIES and all(single.loss > 0 for single in singles)
    torch.testing.assert_close(output.loss, sum(single.loss for single in singles))
    torch.testing.assert_close(output.token_nelbo, sum(single.token_nelbo for single in singles), rtol=1e-4, atol=1e-5)


@layouts
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_so_are_the_gradients(attn_implementation, layout):
    model = random_model(0, attn_implementation)
    batch, parameters = noised_batch(model, layout), list(model.parameters())
    found = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
    singles = [
        torch.autograd.grad(model(**single).loss, parameters, allow_unused=True) for single in single_copies(batch)
    ]
    for actual, *wanted in zip(found, *singles, strict=True):
        if actual is not None:
            torch.testing.assert_close(actual, sum(wanted), rtol=1e-3, atol=1e-5)


@implementations
@pytest.mark.parametrize("interval", [(1.0, 1.0), (0.02, 0.05)])
@torch.no_grad()
def test_complementary_copies_that_mask_all_of_a_block_or_nothing(attn_implementation, interval):
    model = random_model(0, attn_implementation)
    batch = noised_batch(model, sampler=NoiseSampler(num_copies=2, complementary=True), interval=interval)
    singles = [model(**single) for single in single_copies(batch)]
    torch.testing.assert_close(
        model(**batch).token_nelbo, singles[0].token_nelbo + singles[1].token_nelbo, rtol=1e-4, atol=1e-5
    )


@implementations
@torch.no_grad()
def test_each_copy_has_the_noise_levels_of_its_own(attn_implementation):
    model = random_model(0, attn_implementation, time_conditioning=True)
    batch = noised_batch(model)
    output, singles = model(**batch), [model(**single) for single in single_copies(batch)]
    torch.testing.assert_close(output.token_nelbo, sum(single.token_nelbo for single in singles), rtol=1e-4, atol=1e-5)
    batch["timesteps"] = batch["timesteps"].roll(LENGTH, dims=1)
    assert (model(**batch).token_nelbo - output.token_nelbo).abs().max() > 1e-3


@implementations
@torch.no_grad()
def test_copies_do_not_see_each_other(attn_implementation):
    model = random_model(0, attn_implementation)
    batch = noised_batch(model)
    # Of the middle copy alone the losses count.
    batch["loss_weights"][:, :LENGTH] = batch["loss_weights"][:, 2 * LENGTH :] = 0
    nelbo = model(**batch).token_nelbo
    others, itself = batch["input_ids"].clone(), batch["input_ids"].clone()
    others[:, :LENGTH] = others[:, 2 * LENGTH :] = model.config.mask_token_id
    torch.testing.assert_close(model(**{**batch, "input_ids": others}).token_nelbo, nelbo, rtol=1e-4, atol=1e-5)
    itself[:, LENGTH + 1 : 2 * LENGTH] = model.config.mask_token_id
    counted = nelbo > 0
    assert (model(**{**batch, "input_ids": itself}).token_nelbo - nelbo)[counted].abs().max() > 1e-2


@pytest.mark.parametrize("name, size", [("loss_weights", LENGTH), ("input_ids", LENGTH + 1)])
def test_shapes_that_are_no_whole_number_of_copies_are_refused(name, size):
    model = random_model(0)
    batch = noised_batch(model)
    with pytest.raises(ValueError, match=f"{name}|clean_input_ids"):
        model(**{**batch, name: batch[name][:, :size]})


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_the_mask_of_plain_texts_is_kept(attn_implementation):
    kind, device = MaskKind(4, 6, (("full_attention", None),), False, attn_implementation, torch.float32), "cpu"
    assert plain_two_stream_mask(26, 1, kind, device) is plain_two_stream_mask(26, 1, kind, device)
    assert plain_two_stream_mask(26, 1, kind, device) is not plain_two_stream_mask(27, 1, kind, device)


@torch.no_grad()
def test_the_kept_mask_is_that_of_the_same_text_with_its_padding_told():
    flex, dense = (random_model(attn_implementation=name).train() for name in ("flex_attention", "eager"))
    for length in (26, 22, 26):
        ids = torch.randint(22, (2, length), generator=torch.Generator().manual_seed(length))
        losses = []
        for model in (flex, dense):
            for attention_mask in (None, torch.ones_like(ids)):
                torch.manual_seed(0)
                losses.append(model(ids, labels=ids, attention_mask=attention_mask).loss)
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), atol=1e-5, rtol=0)
