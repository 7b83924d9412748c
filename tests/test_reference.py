"""The network and its loss against the dense float64 reference, over blocks, lengths, padding and packed documents."""

import random

import pytest
import reference
import torch
from conftest import DEVICE, random_model
from transformers import DynamicCache, StaticCache

from bd3lm_hf import CommitCache


# Float32 against float64: logits of standard deviation about 1, and gradients relative to the largest of a parameter.
LOGITS_ATOL = 5e-5
LOSS_RTOL = 2e-5
GRADIENT_RTOL = 2e-4

BATCH_SIZE = 3
LENGTHS = {1: 13, 4: 32, 16: 37, "L": 21}
LAYOUTS = ("full", "left_padded", "right_padded", "packed")


@pytest.fixture(params=["eager", "sdpa", "flex_attention"])
def attn_implementation(request):
    if request.param == "flex_attention":
        request.getfixturevalue("uncompiled_flex_attention")
    return request.param


def layout(kind, length):
    """
    (arguments of the model, arguments of the reference) that describe rows of `length` columns.

    The reference is always told positions and documents in full; the model only what a caller would give it.
    """
    if kind == "full":
        return {}, {}
    if kind in ("left_padded", "right_padded"):
        real = torch.tensor([length, length - 3, length // 2])
        columns = torch.arange(length)
        is_real = columns >= (length - real)[:, None] if kind == "left_padded" else columns < real[:, None]
        return ({"attention_mask": is_real.long()},) * 2
    cuts = ([length], [length // 3, length - length // 3], [1, 5, length - 6])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    documents = torch.stack([torch.cat([torch.full((n,), d) for d, n in enumerate(row)]) for row in cuts])
    told = {
        "packed": {"position_ids": positions},
        "packed_by_document_ids": {"document_ids": documents},
        "packed_by_both": {"position_ids": positions, "document_ids": documents},
        "packed_and_right_padded": {"position_ids": positions, "attention_mask": torch.ones_like(positions)},
    }[kind]
    full = {"position_ids": positions, "document_ids": documents}
    if kind == "packed_and_right_padded":
        told["attention_mask"][2, -4:] = 0
        full["attention_mask"] = told["attention_mask"]
    return told, full


def is_real(told, shape):
    return told.get("attention_mask", torch.ones(shape, dtype=torch.long)).bool()


def random_ids(model, length, seed=0, batch_size=BATCH_SIZE):
    """Clean ids [B, L], and noised ids of which half are masked."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(model.config.vocab_size - 1, (batch_size, length), generator=generator)
    masked = torch.rand(x_0.shape, generator=generator) < 0.5
    return x_0, torch.where(masked, model.config.mask_token_id, x_0)


def resolve(block_size, **overrides):
    """(model overrides, length) of a block size, "L" meaning the length itself."""
    length = LENGTHS[block_size]
    return {"block_size": length if block_size == "L" else block_size, **overrides}, length


def assert_logits(model, actual, expected, told):
    assert actual.shape == expected.shape
    real = is_real(told, actual.shape[:2])
    assert expected[real].std() > 0.5, "logits too flat to tell one mask from another"
    torch.testing.assert_close(actual[real].double(), expected[real], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block_size", LENGTHS)
@torch.no_grad()
def test_denoising_logits(block_size, kind, attn_implementation):
    overrides, length = resolve(block_size)
    model = random_model(1, attn_implementation, **overrides)
    told, full = layout(kind, length)
    _, x_t = random_ids(model, length)
    expected = reference.denoising_logits(model.state_dict(), model.config, x_t, **full)
    assert_logits(model, model(input_ids=x_t, **told).logits, expected, told)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block_size", LENGTHS)
@torch.no_grad()
def test_two_stream_logits(block_size, kind, attn_implementation):
    overrides, length = resolve(block_size)
    model = random_model(2, attn_implementation, **overrides)
    told, full = layout(kind, length)
    x_0, x_t = random_ids(model, length)
    expected = reference.two_stream_logits(model.state_dict(), model.config, x_t, x_0, **full)
    assert_logits(model, model(input_ids=x_t, clean_input_ids=x_0, **told).logits, expected, told)


@pytest.mark.parametrize("kind", ["packed_by_document_ids", "packed_by_both", "packed_and_right_padded"])
@pytest.mark.parametrize("block_size", [1, 4])
@torch.no_grad()
def test_every_way_to_describe_packed_documents(block_size, kind, attn_implementation):
    model = random_model(3, attn_implementation, block_size=block_size)
    told, full = layout(kind, 21)
    x_0, x_t = random_ids(model, 21)
    state = model.state_dict()
    expected = reference.denoising_logits(state, model.config, x_t, **full)
    assert_logits(model, model(input_ids=x_t, **told).logits, expected, told)
    expected = reference.two_stream_logits(state, model.config, x_t, x_0, **full)
    assert_logits(model, model(input_ids=x_t, clean_input_ids=x_0, **told).logits, expected, told)


@torch.no_grad()
def test_packed_documents_get_what_they_would_get_alone(attn_implementation):
    model = random_model(4, attn_implementation)
    x_0, x_t = random_ids(model, 21)
    told, full = layout("packed", 21)
    packed = model(input_ids=x_t, clean_input_ids=x_0, **told).logits
    for row in range(BATCH_SIZE):
        for document in full["document_ids"][row].unique():
            columns = full["document_ids"][row] == document
            alone = model(input_ids=x_t[row : row + 1, columns], clean_input_ids=x_0[row : row + 1, columns]).logits
            torch.testing.assert_close(packed[row, columns], alone[0], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("block_size", [1, 4, 6])
@torch.no_grad()
def test_window_past_the_context_length(block_size, attn_implementation):
    # 12 of 16 tokens is no multiple of 6 either: W = ceil(M / s) - 1.
    model = random_model(5, attn_implementation, block_size=block_size, max_position_embeddings=16)
    x_0, x_t = random_ids(model, 45)
    state = model.state_dict()
    expected = reference.denoising_logits(state, model.config, x_t)
    assert_logits(model, model(input_ids=x_t).logits, expected, {})
    expected = reference.two_stream_logits(state, model.config, x_t, x_0)
    assert_logits(model, model(input_ids=x_t, clean_input_ids=x_0).logits, expected, {})


@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("time_conditioning", [True, False])
@torch.no_grad()
def test_noise_level(adaln, time_conditioning, attn_implementation):
    model = random_model(6, attn_implementation, adaln=adaln, time_conditioning=time_conditioning)
    x_0, x_t = random_ids(model, 18)
    state = model.state_dict()
    assert any("adaln" in name for name in state) == adaln
    per_row = torch.tensor([0.0, 0.7, 3.0])
    per_token = 3 * torch.rand(BATCH_SIZE, 18, generator=torch.Generator().manual_seed(0))
    for sigma in (None, per_row, per_token):
        expected = reference.denoising_logits(state, model.config, x_t, sigma=sigma)
        assert_logits(model, model(input_ids=x_t, timesteps=sigma).logits, expected, {})
        # A noise level per token says nothing of the clean stream, whose level is 0.
        clean = torch.zeros(BATCH_SIZE) if sigma is per_token else None
        expected = reference.two_stream_logits(state, model.config, x_t, x_0, sigma=sigma, clean_sigma=clean)
        assert_logits(model, model(input_ids=x_t, clean_input_ids=x_0, timesteps=sigma).logits, expected, {})


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 1}, {"intermediate_size": 40, "rope_theta": 100.0}])
@torch.no_grad()
def test_other_sizes_of_the_network(overrides, attn_implementation):
    model = random_model(7, attn_implementation, **overrides)
    x_0, x_t = random_ids(model, 18)
    expected = reference.two_stream_logits(model.state_dict(), model.config, x_t, x_0)
    assert_logits(model, model(input_ids=x_t, clean_input_ids=x_0).logits, expected, {})


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cached_logits_of_left_padded_rows_past_the_window(kind, attn_implementation):
    # Rows of 12, 8 and 4 tokens end at the same column, so that every row is at a border between blocks; with W = 3
    # the shortest row slides its window last.
    size, width, length = 4, 12, 32
    model = random_model(15, attn_implementation, block_size=size, max_position_embeddings=16)
    x_0, x_t = random_ids(model, length)
    mask = (torch.arange(length) >= torch.tensor([[0], [4], [8]])).long()
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=length + size)
    model(input_ids=x_0[:, :width], attention_mask=mask[:, :width], cache=cache)
    for start in range(width, length, size):
        end = start + size
        noised = x_t[:, start:end]
        actual = model(input_ids=noised, attention_mask=mask[:, :end], cache=CommitCache(cache, 0)).logits
        text = torch.cat([x_0[:, :start], noised], dim=1)
        expected = reference.denoising_logits(model.state_dict(), model.config, text, attention_mask=mask[:, :end])[
            :, start:
        ]
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=LOGITS_ATOL)
        model(input_ids=x_0[:, start:end], attention_mask=mask[:, :end], cache=cache)
        assert int(cache.get_seq_length()) == end


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformers' FlexAttention does not compile for a CPU")
def test_compiled_flex_attention():
    model = random_model(8, "flex_attention")
    told, full = layout("left_padded", 37)
    x_0, x_t = random_ids(model, 37)
    with torch.no_grad():
        actual = model(input_ids=x_t, clean_input_ids=x_0, **told).logits
    expected = reference.two_stream_logits(model.state_dict(), model.config, x_t, x_0, **full)
    assert_logits(model, actual, expected, told)


def make_labels(x_0, told, seed=0, fraction=0.2):
    """Labels with -100 at padding and at a random fraction of the tokens."""
    dropped = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed)) < fraction
    return torch.where(dropped | ~is_real(told, x_0.shape), -100, x_0)


def times_of_tokens(config, t, p):
    """The t [B, L] among those drawn for a token's row that has its mask probability."""
    of_blocks = reference.SCHEDULES[config.noise_schedule](t.double())[0]
    return t.gather(1, (of_blocks[:, None, :] - p.double()[:, :, None]).abs().argmin(-1)).double()


def reference_loss(state, config, x_0, labels, full, draws):
    """(loss, nelbo [B, L]) of the draws that the model met."""
    t, p, x_t = draws
    positions, real, documents = reference._layout(
        x_0, full.get("attention_mask"), full.get("position_ids"), full.get("document_ids")
    )
    predicted = (labels != -100) & real
    if config.ignore_bos:
        predicted &= positions != 0
    assert torch.equal(x_t[~predicted], x_0[~predicted]), "what is not predicted is not masked"
    t = times_of_tokens(config, t, p)
    p, weight = reference.SCHEDULES[config.noise_schedule](t)
    blocks = torch.stack([documents, positions // config.block_size], dim=-1)
    for row in range(len(x_0)):
        of_block = {tuple(block): set() for block in blocks[row][real[row]].tolist()}
        for block, time in zip(blocks[row][real[row]].tolist(), t[row][real[row]].tolist(), strict=True):
            of_block[tuple(block)].add(time)
        times = [time for found in of_block.values() for time in found]
        assert len(times) == len(set(times)) == len(of_block), "one t per block, and each its own"
    sigma = -torch.log(1 - p)
    logits = reference.two_stream_logits(
        state, config, x_t, x_0, **full, sigma=sigma, clean_sigma=torch.zeros(len(x_0))
    )
    nelbo = reference.token_losses(logits, x_t, x_0, weight, predicted, config.mask_token_id)
    return nelbo.sum() / predicted.sum(), nelbo.detach()


def assert_loss_and_gradients(model, x_0, labels, told, full, recorded_draws):
    """Runs a training pass, and compares loss, per-token nelbo and the gradient of every parameter."""
    model.train().zero_grad()
    output = model(input_ids=x_0, labels=labels, **told)
    state = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    loss, nelbo = reference_loss(state, model.config, x_0, labels, full, recorded_draws[-1])
    assert output.loss.item() == pytest.approx(loss.item(), rel=LOSS_RTOL, abs=1e-7)
    torch.testing.assert_close(output.token_nelbo.double(), nelbo, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = state[name].grad
        bound = GRADIENT_RTOL * expected.abs().max().item() + 1e-7
        assert parameter.grad is not None, name
        assert (parameter.grad.double() - expected).abs().max().item() <= bound, name


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block_size", LENGTHS)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_loss_and_gradient_of_every_parameter(block_size, kind, attn_implementation, recorded_draws):
    overrides, length = resolve(block_size, noise_interval=(0.1, 0.9))
    model = random_model(9, attn_implementation, **overrides)
    told, full = layout(kind, length)
    x_0, _ = random_ids(model, length)
    torch.manual_seed(0)
    assert_loss_and_gradients(model, x_0, make_labels(x_0, told), told, full, recorded_draws)


@pytest.mark.parametrize(
    "overrides",
    [
        {"adaln": False},
        {"time_conditioning": True},
        {"time_conditioning": True, "block_size": 1},
        {"ignore_bos": False},
        {"max_position_embeddings": 8},
        {"num_hidden_layers": 1},
        *({"noise_schedule": name} for name in ("square", "square_root", "log", "cosine")),
    ],
)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_loss_and_gradients_of_every_option(overrides, attn_implementation, recorded_draws):
    model = random_model(10, attn_implementation, **{"noise_interval": (0.1, 0.9), **overrides})
    x_0, _ = random_ids(model, 26)
    torch.manual_seed(1)
    assert_loss_and_gradients(model, x_0, make_labels(x_0, {}), {}, {}, recorded_draws)


@pytest.mark.parametrize("kind", ["packed_by_document_ids", "packed_by_both", "packed_and_right_padded"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_loss_and_gradients_of_packed_documents(kind, attn_implementation, recorded_draws):
    model = random_model(11, attn_implementation, noise_interval=(0.1, 0.9))
    told, full = layout(kind, 27)
    x_0, _ = random_ids(model, 27)
    torch.manual_seed(2)
    assert_loss_and_gradients(model, x_0, make_labels(x_0, told), told, full, recorded_draws)


@pytest.mark.parametrize("kind", LAYOUTS)
@torch.no_grad()
def test_loss_under_flex_attention(kind, recorded_draws, uncompiled_flex_attention):
    model = random_model(12, "flex_attention").train()
    told, full = layout(kind, 26)
    x_0, _ = random_ids(model, 26)
    labels = make_labels(x_0, told)
    torch.manual_seed(3)
    output = model(input_ids=x_0, labels=labels, **told)
    loss, nelbo = reference_loss(model.state_dict(), model.config, x_0, labels, full, recorded_draws[-1])
    assert output.loss.item() == pytest.approx(loss.item(), rel=LOSS_RTOL)
    torch.testing.assert_close(output.token_nelbo.double(), nelbo, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [7, 16])
def test_more_queries_than_one_chunk(block_size, recorded_draws):
    # Blocks of 7 straddle every boundary between chunks of queries.
    length = 2 * 128 + 45
    model = random_model(
        13, "sdpa", block_size=block_size, max_position_embeddings=512, noise_interval=(0.2, 0.9), hidden_size=16
    )
    told, full = layout("left_padded", length)
    x_0, x_t = random_ids(model, length)
    with torch.no_grad():
        actual = model(input_ids=x_t, clean_input_ids=x_0, **told).logits
    expected = reference.two_stream_logits(model.state_dict(), model.config, x_t, x_0, **full)
    assert_logits(model, actual, expected.detach(), told)
    torch.manual_seed(4)
    assert_loss_and_gradients(model, x_0, make_labels(x_0, told), told, full, recorded_draws)


@pytest.mark.parametrize("seed", range(40))
def test_loss_and_gradients_of_shapes_nobody_thought_of(seed, recorded_draws):
    # What the pass leaves out depends on which blocks hold a prediction: here anything from one token to all.
    draw = random.Random(seed)
    length, kind = draw.randint(10, 40), draw.choice([*LAYOUTS, "packed_by_document_ids", "packed_by_both"])
    model = random_model(
        seed,
        draw.choice(["eager", "sdpa", "sdpa"]),
        block_size=draw.choice([1, 2, 3, 5, 8, 13]),
        max_position_embeddings=draw.choice([13, 20, 64]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        adaln=draw.random() < 0.7,
        time_conditioning=draw.random() < 0.5,
        ignore_bos=draw.random() < 0.5,
        noise_interval=draw.choice([(0.01, 0.1), (0.1, 0.9), (0.9, 0.99)]),
    )
    told, full = layout(kind, length)
    x_0, _ = random_ids(model, length, seed)
    labels = make_labels(x_0, told, seed, fraction=draw.choice([0.0, 0.3, 0.9]))
    torch.manual_seed(seed)
    assert_loss_and_gradients(model, x_0, labels, told, full, recorded_draws)


def test_a_draw_that_masks_nothing_has_no_loss_and_no_gradient(chosen_draws):
    model = random_model(14, "sdpa").train()
    x_0, _ = random_ids(model, 18)
    chosen_draws(torch.full((BATCH_SIZE, 5), 0.001), torch.zeros(x_0.shape, dtype=torch.bool))
    output = model(input_ids=x_0, labels=x_0)
    assert output.loss.item() == 0 and not output.token_nelbo.any()
    output.loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_training_under_flex_attention_on_a_cpu_is_refused(uncompiled_flex_attention):
    model = random_model(12, "flex_attention").train()
    x_0, _ = random_ids(model, 18)
    with pytest.raises(
        ValueError, match=r"`attn_implementation` must be 'sdpa'.*'flex_attention', which has no backward"
    ):
        model(input_ids=x_0, labels=x_0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": (1, 8), "inputs_embeds": (1, 8, 32)}, "one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": (1, 8), "attention_mask": (1, 7)}, r"`attention_mask`.*\[1, 8\].*\[1, 7\]"),
        ({"input_ids": (1, 8), "clean_input_ids": (1, 7)}, r"`clean_input_ids`.*\[1, 7\].*\[1, 8\]"),
        ({"input_ids": (1, 8), "document_ids": (1, 7)}, r"`document_ids`.*\[1, 8\].*\[1, 7\]"),
        ({"clean_input_ids": (1, 8), "inputs_embeds": (1, 8, 32)}, "`clean_input_ids`.*`input_ids`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    model = random_model(0)
    arguments = {
        name: torch.ones(shape, dtype=torch.float if name == "inputs_embeds" else torch.long)
        for name, shape in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        model(**arguments)
