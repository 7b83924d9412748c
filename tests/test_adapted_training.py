"""The loss of adapted networks and its gradients: those of dense passes by the stock class, a block at a time."""

import pytest
import torch
from adapted_cases import (
    ARCHITECTURES,
    MASK,
    THREE,
    VARIANTS,
    adapt,
    close,
    dense_scores,
    noised,
    random_ids,
    stock_model,
)

from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.sampler import NoiseSampler


LENGTH = 14
FOUR = [*THREE, "mistral"]


def noise(num_rows=2, length=LENGTH, seed=0, clean_block=None):
    """A text, x_t, one block of which may be clean, and weights in the loss, each [num_rows, length]."""
    x_0 = random_ids(num_rows, length, seed)
    x_t = noised(x_0, seed + 1)
    x_t[:, 1] = MASK
    if clean_block is not None:
        x_t[:, 4 * clean_block : 4 * clean_block + 4] = x_0[:, 4 * clean_block : 4 * clean_block + 4]
    generator = torch.Generator().manual_seed(seed)
    return x_0, x_t, 0.5 + torch.rand(x_0.shape, generator=generator)


def inputs_of(x_0, x_t, weights, **kwargs):
    return {"input_ids": x_t, "clean_input_ids": x_0, "labels": x_0, "loss_weights": weights, **kwargs}


def dense_loss(stock, config, x_0, x_t, weights):
    """The weighted cross-entropy of the masked tokens over the number of predicted ones, block by block."""
    total = 0.0
    for row in range(len(x_0)):
        for start in range(0, x_0.shape[1], config.block_size):
            columns = range(start, min(start + config.block_size, x_0.shape[1]))
            masked = [i for i in columns if x_t[row, i] == MASK and i > 0]
            if not masked:
                continue
            scores = dense_scores(stock, config, x_t[row, None], x_0[row, None], start // config.block_size)
            for i in masked:
                kept = torch.cat([scores[i - start, :MASK], scores[i - start, MASK + 1 :]])
                total = total + weights[row, i] * (kept.logsumexp(0) - scores[i - start, x_0[row, i]])
    return total / (len(x_0) * (x_0.shape[1] - 1))


def check_gradients(name, kind="sdpa", **variant):
    stock, model = stock_model(name, kind), adapt(name, kind, **variant)
    # A block without a masked token is left out of the pass.
    draws = noise(clean_block=1)
    loss = model(**inputs_of(*draws)).loss
    expected = dense_loss(stock, model.config, *draws)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == {name for name, _ in stock.named_parameters()}
    for parameter_name, parameter in stock.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest > 0 or parameter_name.endswith("k_proj.bias")
        difference = (gradients[parameter_name] - parameter.grad).abs().max()
        assert difference < 1e-5 + 1e-4 * largest, parameter_name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_dense_passes(name):
    check_gradients(name, "eager" if name == "gemma2" else "sdpa")


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(("shift_logits", "clean_attention"), VARIANTS[1:])
def test_gradients_of_each_variant_equal_those_of_dense_passes(name, shift_logits, clean_attention):
    check_gradients(name, "eager", shift_logits=shift_logits, clean_attention=clean_attention)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("shift_logits", [True, "noisy"])
def test_several_noised_copies_add_up(name, shift_logits):
    model = adapt(name, shift_logits=shift_logits)
    x_0, x_t, weights = noise()
    other = (noised(x_0, seed=9), weights.flip(1))
    both = [torch.cat(pair, dim=1) for pair in zip((x_t, weights), other, strict=True)]
    nelbo = model(**inputs_of(x_0, *both)).token_nelbo
    alone = model(**inputs_of(x_0, x_t, weights)).token_nelbo + model(**inputs_of(x_0, *other)).token_nelbo
    close(nelbo, alone)


@pytest.mark.parametrize("name", THREE)
def test_complementary_copies_predict_each_token_once(name):
    model, x_0 = adapt(name), random_ids(2, LENGTH)
    blocks = TextBlocks.of_batch(model.config, x_0, x_0)
    sampler = NoiseSampler(num_copies=2, complementary=True)
    drawn = sampler.draw(model.config, (0.3, 0.8), x_0, blocks, range(2), num_rows=2, seed=(0,))
    first, second = drawn.x_t.split(LENGTH, dim=1)
    assert ((first == MASK) ^ (second == MASK))[:, 1:].all()
    nelbo = model(**drawn.inputs(x_0), labels=x_0).token_nelbo
    assert (nelbo[:, 1:] > 0).all() and (nelbo[:, 0] == 0).all()
    parts = zip((first, second), drawn.loss_weights.split(LENGTH, dim=1), strict=True)
    close(nelbo, sum(model(**inputs_of(x_0, *part)).token_nelbo for part in parts))


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize(("shift_logits", "clean_attention"), VARIANTS[::3] + VARIANTS[-1:])
def test_packed_documents_are_as_alone(name, shift_logits, clean_attention):
    model = adapt(name, shift_logits=shift_logits, clean_attention=clean_attention)
    documents = [noise(1, length, seed=length) for length in (6, 9, 5)]
    packed = [torch.cat(parts, dim=1) for parts in zip(*documents, strict=True)]
    alone = torch.cat([model(**inputs_of(*parts)).token_nelbo for parts in documents], dim=1)
    positions = torch.cat([torch.arange(length) for length in (6, 9, 5)])[None]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor([6, 9, 5]))[None]
    assert (alone > 0).sum() > 5
    for text in ({"position_ids": positions}, {"document_ids": numbers}):
        close(model(**inputs_of(*packed, **text)).token_nelbo, alone)
        # A denoising pass over all of them, too.
        x_t = packed[1]
        with torch.no_grad():
            logits = model(input_ids=x_t, **text).logits
            for start, end in ((0, 6), (6, 15), (15, 20)):
                # Shifted logits predict no first token.
                first = int(bool(shift_logits))
                close(logits[:, start + first : end], model(input_ids=x_t[:, start:end]).logits[:, first:])


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    for variant in ({}, {"shift_logits": False, "clean_attention": "causal"}, {"shift_logits": "noisy"}):
        model = adapt(name, **variant)
        rows = [noise(1, length, seed=length) for length in (14, 5)]
        short = [torch.nn.functional.pad(part, (9, 0) if side == "left" else (0, 9)) for part in rows[1]]
        batch = [torch.cat(parts) for parts in zip(rows[0], short, strict=True)]
        mask = torch.ones(2, 14, dtype=torch.long)
        real = slice(9, 14) if side == "left" else slice(0, 5)
        mask[1] = 0
        mask[1, real] = 1
        nelbo = model(**inputs_of(*batch, attention_mask=mask)).token_nelbo
        close(nelbo[:1], model(**inputs_of(*rows[0])).token_nelbo)
        close(nelbo[1:, real], model(**inputs_of(*rows[1])).token_nelbo)
        assert (nelbo[0] > 0).sum() > 2 and (nelbo[1, real] > 0).any()
        assert nelbo[1].sum() == nelbo[1, real].sum()


def test_a_causal_clean_stream_is_no_block_wise_one():
    # The control of the tests above: the two attentions, and the three ways to shift, give losses of their own.
    draws, losses = noise(), set()
    for shift_logits, clean_attention in VARIANTS:
        model = adapt("llama", shift_logits=shift_logits, clean_attention=clean_attention)
        losses.add(round(model(**inputs_of(*draws)).loss.item(), 5))
    assert len(losses) == len(VARIANTS)


def test_training_and_evaluation_by_labels_alone():
    model, ids = adapt("gemma3").train(), random_ids(4, LENGTH)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(model(input_ids=ids, labels=ids, noise_interval=(0.4, 0.9)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    model.eval()
    assert model(input_ids=ids, labels=ids).loss == model(input_ids=ids, labels=ids).loss


def router_loss(stock, scores):
    """
    Switch Transformer's loss (arXiv 2101.03961, Eq. 4 to 6) as the stock class has it, over the scores that a list of
    [tokens, experts] for each layer holds.
    """
    num_experts, top_k = stock.config.num_experts, stock.config.num_experts_per_tok
    probabilities = torch.cat(scores).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0)
    return num_experts * (chosen.mean(0) * probabilities.mean(0)).sum()


def test_unevenly_used_experts_cost_as_in_the_stock_class():
    fields = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    x_0, x_t, weights = noise(clean_block=1)
    padding = torch.ones_like(x_0)
    padding[1, 9:] = 0
    labels = x_0.masked_fill(padding == 0, -100)
    inputs = inputs_of(x_0, x_t, weights, attention_mask=padding) | {"labels": labels}
    plain, balanced = (adapt("qwen3_moe", overrides=part).train() for part in ({}, fields))
    difference = balanced(**inputs).loss - plain(**inputs).loss

    # Routers that are asked one layer after the other, over all tokens of both streams but padding.
    seen = []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    plain(input_ids=x_t, clean_input_ids=x_0, attention_mask=padding)
    is_real = padding.repeat(1, 2).flatten().bool()
    expected = router_loss(stock_model("qwen3_moe"), [scores[is_real] for scores in seen])
    close(difference, 0.5 * expected)
    # Asked for by the call; and what is reported as likelihood has no part of it.
    close(plain(**inputs, output_router_logits=True).loss - plain(**inputs).loss, 0.001 * expected)
    assert torch.equal(balanced.eval()(**inputs).loss, plain.eval()(**inputs).loss)


def test_the_loss_of_experts_is_the_stock_classes_formula_and_reaches_the_routers():
    fields = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    stock, ids = stock_model("qwen3_moe", **fields), random_ids(2, LENGTH)
    outputs = stock(ids)
    close(router_loss(stock, list(outputs.router_logits)), outputs.aux_loss)
    gradients = {}
    for name, part in (("plain", {}), ("balanced", fields)):
        model = adapt("qwen3_moe", overrides=part).train()
        model(**inputs_of(*noise())).loss.backward()
        gradients[name] = model.model.layers[0].mlp.gate.weight.grad
    assert not torch.allclose(gradients["plain"], gradients["balanced"], atol=1e-4)
