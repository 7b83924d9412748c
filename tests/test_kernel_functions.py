"""The functions that the kernels of a CPU are made of compute what their plain formulation does."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from bd3lm_hf.kernels import cpu_attention, cpu_linear, cpu_loss
from bd3lm_hf.kernels.cpu_attention import attend, chunks_of
from bd3lm_hf.kernels.cpu_linear import MLP, GatedLinear, Linear, NormedLinear
from bd3lm_hf.kernels.cpu_loss import TokenNats
from bd3lm_hf.kernels.cpu_nucleus import SelectingTopPLogitsWarper, with_selecting_nucleus


EPSILON = 1e-5
HIDDEN, MIDDLE = 6, 15


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normed_linear(states, norm_weight, norm_bias, *weights):
    normed = layer_norm(states, (HIDDEN,), norm_weight, norm_bias, EPSILON)
    return tuple(nn.functional.linear(normed, weight) for weight in weights)


def gated_linear(residual, states, weight, gate):
    branch = nn.functional.linear(states, weight)
    return residual + (branch if gate is None else gate * branch)


def mlp(states, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias):
    normed = layer_norm(states, (HIDDEN,), norm_weight, norm_bias, EPSILON)
    middle = gelu(nn.functional.linear(normed, up_weight, up_bias), approximate="tanh")
    return nn.functional.linear(middle, down_weight, down_bias)


def fused_mlp(gate, is_branch):
    def fused(states, norm_weight, norm_bias, *parameters):
        parameters, gates = parameters[:4], parameters[4:] or (None,)
        return MLP.apply(states, norm_weight, norm_bias, EPSILON, *parameters, *gates, is_branch)

    def plain(states, *parameters):
        branch = mlp(states, *parameters[:6])
        branch = parameters[6] * branch if gate else branch
        return states + branch if is_branch else branch

    shapes = [(2, 3, HIDDEN), (HIDDEN,), (HIDDEN,), (MIDDLE, HIDDEN), (MIDDLE,), (HIDDEN, MIDDLE), (HIDDEN,)]
    return fused, plain, [random(*shape) for shape in shapes] + ([random(HIDDEN)] if gate else [])


def fused_norm(states, weight, bias, *rest):
    return NormedLinear.apply(states, weight, bias, EPSILON, *rest)


def plain_nats(hidden_states, weight, bias):
    logits = nn.functional.linear(hidden_states, weight, bias)
    logits = logits.masked_fill(torch.arange(len(weight)) == 4, -torch.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(hidden_states)) % 4, reduction="none")


def fused_nats(hidden_states, weight, bias):
    return TokenNats.apply(hidden_states, weight, bias, torch.arange(len(hidden_states)) % 4, 4)


CASES = {
    "linear": lambda: (Linear.apply, nn.functional.linear, [random(2, 3, 4), random(HIDDEN, 4), random(HIDDEN)]),
    "linear_without_bias": lambda: (Linear.apply, nn.functional.linear, [random(3, 4), random(HIDDEN, 4), None]),
    "normed_linear": lambda: (
        *(fused_norm, normed_linear),
        [random(2, 3, HIDDEN), random(HIDDEN), random(HIDDEN), random(4, HIDDEN), random(5, HIDDEN)],
    ),
    "normed_linear_without_shift": lambda: (
        *(fused_norm, normed_linear),
        [random(3, HIDDEN), random(HIDDEN), None, random(4, HIDDEN)],
    ),
    "gated_linear": lambda: (
        *(GatedLinear.apply, gated_linear),
        [random(2, 3, HIDDEN), random(2, 3, 4), random(HIDDEN, 4), random(HIDDEN)],
    ),
    "linear_without_gate": lambda: (
        *(GatedLinear.apply, gated_linear),
        [random(2, 3, HIDDEN), random(2, 3, 4), random(HIDDEN, 4), None],
    ),
    "mlp": lambda: fused_mlp(False, False),
    "mlp_branch": lambda: fused_mlp(False, True),
    "gated_mlp_branch": lambda: fused_mlp(True, True),
    "nats": lambda: (fused_nats, plain_nats, [random(9, HIDDEN), random(5, HIDDEN), random(5)]),
}


@pytest.fixture(autouse=True)
def few_kept_logits(monkeypatch):
    """Chunks of three rows, of which two are kept."""
    monkeypatch.setattr(cpu_loss, "CHUNK_NUMEL", 15)
    monkeypatch.setattr(cpu_loss, "KEPT_NUMEL", 30)


def values_and_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (output.double() ** 2 * torch.arange(1, output.numel() + 1).view(output.shape)).sum() for output in outputs
    )
    return [*outputs, *torch.autograd.grad(total, [tensor for tensor in inputs if tensor is not None])]


@pytest.mark.parametrize("name", [name for name in CASES if name != "nats"])
def test_gradients_are_those_of_finite_differences(name):
    fused, _, inputs = CASES[name]()
    assert torch.autograd.gradcheck(fused, inputs)


@pytest.mark.parametrize("is_intel", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_formulation(name, is_intel, monkeypatch):
    monkeypatch.setattr(cpu_linear, "is_intel", lambda: is_intel)
    fused, plain, inputs = CASES[name]()
    inputs = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in inputs]
    for got, expected in zip(values_and_gradients(fused, inputs), values_and_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"linear", "linear_without_bias", "nats"}))
def test_autocast_computes_in_its_precision_and_keeps_that_of_the_gradients(name):
    fused, plain, inputs = CASES[name]()
    inputs = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = values_and_gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = values_and_gradients(fused, inputs)
        precisions = [tensor.dtype for tensor in values_and_gradients(plain, inputs)]
    assert [tensor.dtype for tensor in results] == precisions
    for got, exact in zip(results, expected, strict=True):
        assert (got.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("index", range(8))
def test_only_wanted_gradients_are_computed(index):
    fused, plain, inputs = CASES["gated_mlp_branch"]()
    for position, tensor in enumerate(inputs):
        tensor.requires_grad_(position == index)
    gradients = [torch.autograd.grad(function(*inputs).pow(2).sum(), inputs[index])[0] for function in (fused, plain)]
    torch.testing.assert_close(*gradients)


def test_torchs_switch_of_onednn_is_obeyed(monkeypatch):
    monkeypatch.setattr(cpu_linear, "is_intel", lambda: False)
    assert cpu_linear.uses_onednn(torch.float32) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpu_linear.uses_onednn(torch.float32) and not cpu_linear.uses_onednn(torch.bfloat16)


# Attention.


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu_attention, "CHUNK_SIZE", 8)
    monkeypatch.setattr(cpu_attention, "MIN_GAP", 3)


def heads(num_tokens, dtype=torch.float32):
    return torch.randn(2, num_tokens, 3, 4, dtype=dtype).transpose(1, 2).requires_grad_()


def mask_of_runs():
    """Of each of 30 queries a random run of 40 keys; and in the second row another key far away."""
    start = torch.randint(32, (2, 1, 30, 1)).sort(dim=2).values
    keys = torch.arange(40)
    mask = (keys >= start) & (keys < start + 4)
    mask[1, :, 3:5, 39] = True
    return mask


def test_attention_over_tiles_is_attention_under_the_mask(small_chunks):
    mask = mask_of_runs()
    chunks = chunks_of(mask, torch.float32)
    assert max(len(chunk.tiles) for chunk in chunks) > 1
    inputs = [heads(30), heads(40), heads(40)]
    found = values_and_gradients(lambda *inputs: attend(*inputs, mask, 0.7), inputs)

    def plain(query, key, value):
        scores = (0.7 * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    for got, expected in zip(found, values_and_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tiles_hold_no_more_than_what_is_seen_and_small_gaps(small_chunks):
    mask = torch.zeros(1, 1, 16, 100, dtype=torch.bool)
    mask[..., :8, 10:20] = mask[..., :8, 22:30] = mask[..., 8:, 50:60] = mask[..., 3, 70] = True
    tiles = [
        (chunk.start, chunk.end, tile.start, tile.end)
        for chunk in chunks_of(mask, torch.float32)
        for tile in chunk.tiles
    ]
    assert tiles == [(0, 8, 10, 30), (0, 8, 70, 71), (8, 16, 50, 60)]
    # All of the second chunk's keys are seen by all of its queries.
    assert chunks_of(mask, torch.float32)[1].tiles[0].mask is None


def test_dense_masks_and_masks_with_a_blind_query_are_left_to_sdpa(small_chunks):
    mask = mask_of_runs()
    assert chunks_of(mask, torch.float32) is not None
    assert chunks_of(torch.ones(1, 1, 30, 40, dtype=torch.bool).tril(20), torch.float32) is None
    blind = mask.clone()
    blind[0, 0, 5] = False
    assert chunks_of(blind, torch.float32) is None
    assert attend(heads(30), heads(40), heads(40), blind, 1.0).isfinite().all()


def test_a_mask_that_is_changed_in_place_is_read_again(small_chunks):
    mask = mask_of_runs()
    before = chunks_of(mask, torch.float32)
    assert chunks_of(mask, torch.float32) is before
    mask[:, :, 0] = True
    after = chunks_of(mask, torch.float32)[0].tiles
    assert (
        [(tile.start, tile.end) for tile in after] == [(0, 40)] != [(tile.start, tile.end) for tile in before[0].tiles]
    )


def test_nothing_is_kept_of_a_mask_that_is_gone(small_chunks):
    num_kept = len(cpu_attention._NOTES)
    mask = mask_of_runs()
    chunks_of(mask, torch.float32)
    assert len(cpu_attention._NOTES) == num_kept + 1
    del mask
    assert len(cpu_attention._NOTES) == num_kept


# Nucleus.


VOCAB_SIZE = 10_000
TEXT = torch.zeros(6, 3, dtype=torch.long)
# What float32 cannot tell: a token may be in or out whose nucleus would be full so close to p.
TOLERANCE = 1e-5


def scores_of_widths(*temperatures, vocab_size=VOCAB_SIZE):
    """A row for each: the higher its temperature, the wider its nucleus."""
    scores = 3 * torch.randn(len(temperatures), vocab_size, generator=torch.Generator().manual_seed(0))
    scores = scores / torch.tensor(temperatures)[:, None]
    scores[:, 7] = -torch.inf
    return scores


def mass_before(scores):
    """The probability of all likelier tokens, at each token."""
    probabilities, ids = scores.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probabilities).scatter_(1, ids, probabilities.cumsum(-1) - probabilities)


@pytest.mark.parametrize("warper_class", [TopPLogitsWarper, SelectingTopPLogitsWarper])
@pytest.mark.parametrize("top_p", [0.0, 1e-12, 1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3000])
@pytest.mark.parametrize("temperatures", [(0.1, 0.2, 0.3, 0.5), (0.2, 0.5, 30.0, 1.0, 2.0, 0.1), (300.0,)])
def test_rows_keep_their_nucleus(warper_class, top_p, temperatures, vocab_size):
    scores = scores_of_widths(*temperatures, vocab_size=vocab_size)
    warped = warper_class(top_p)(TEXT[: len(scores)], scores)
    is_kept, before = warped > -torch.inf, mass_before(scores)
    assert torch.equal(warped[is_kept], scores[is_kept])
    assert is_kept[before < top_p - TOLERANCE].all()
    assert not is_kept[before > top_p + TOLERANCE].any()
    assert is_kept.gather(1, scores.argmax(-1, keepdim=True)).all()


@pytest.mark.parametrize("vocab_size", [100, 2048, 2049, 3000, 8192, 8193, VOCAB_SIZE])
@pytest.mark.parametrize("top_p", [0.0, 1e-12])
def test_a_nucleus_of_nothing_is_the_likeliest_token_in_every_vocabulary(vocab_size, top_p):
    scores = scores_of_widths(0.1, 0.5, 2.0, 30.0, vocab_size=vocab_size)
    text = TEXT[: len(scores)]
    warped = SelectingTopPLogitsWarper(top_p)(text, scores)
    assert torch.equal(warped, TopPLogitsWarper(top_p)(text, scores))
    assert ((warped > -torch.inf).sum(-1) == 1).all()


def test_so_many_tokens_are_kept_at_least():
    scores = scores_of_widths(0.1, 0.2, 30.0)
    kept = SelectingTopPLogitsWarper(0.5, min_tokens_to_keep=40)(TEXT[:3], scores) > -torch.inf
    assert kept.sum(-1).tolist()[:2] == [40, 40] and kept[2].sum() > 512
    kept = SelectingTopPLogitsWarper(0.5, min_tokens_to_keep=600)(TEXT[:3], scores) > -torch.inf
    assert kept.sum(-1).min() == 600


def test_a_vocabulary_is_not_sorted(monkeypatch):
    monkeypatch.setattr(torch, "sort", lambda *args, **kwargs: pytest.fail("sorted"))
    SelectingTopPLogitsWarper(0.9)(TEXT, scores_of_widths(0.2, 0.5, 30.0, 0.4, 0.3, 0.1))
    with pytest.raises(pytest.fail.Exception, match="sorted"):
        TopPLogitsWarper(0.9)(TEXT, scores_of_widths(0.2, 0.5, 30.0, 0.4, 0.3, 0.1))


def test_equal_scores_have_a_nucleus_of_their_share():
    warped = SelectingTopPLogitsWarper(0.9)(TEXT[:1], torch.zeros(1, VOCAB_SIZE))
    assert abs(int((warped > -torch.inf).sum()) - 0.9 * VOCAB_SIZE) <= 1


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_distribution_reach_the_check_behind(bad, vocab_size):
    scores = scores_of_widths(30.0, 30.0, vocab_size=vocab_size)
    scores[1, 3] = bad
    warped = SelectingTopPLogitsWarper(0.9)(TEXT[:2], scores)
    assert warped[0].amax().isfinite() and not warped[1].amax().isfinite()


def test_transformers_own_warper_alone_is_exchanged():
    class Other(TopPLogitsWarper):
        pass

    processors = LogitsProcessorList([TopKLogitsWarper(3), TopPLogitsWarper(0.7, min_tokens_to_keep=2), Other(0.5)])
    exchanged = with_selecting_nucleus(processors)
    assert [type(part) for part in exchanged] == [TopKLogitsWarper, SelectingTopPLogitsWarper, Other]
    assert exchanged[1].top_p == 0.7 and exchanged[1].min_tokens_to_keep == 2
    assert type(processors[1]) is TopPLogitsWarper
