"""The mathematics without a network: schedules, the draw of t, the forward process, the SUBS rules."""

import math

import pytest
import reference
import torch
from conftest import DEVICE

from bd3lm_hf.modeling.diffusion_block_diffusion import (
    NOISE_SCHEDULES,
    forward_process,
    sample_timesteps,
    sigma_from_mask_probability,
    subs_log_probs,
)


SCHEDULES = ("loglinear", "square", "square_root", "log", "cosine")
EPS = 1e-3

# Two-sided false-alarm rate of every statistical claim below, per comparison; seeds are fixed.
ALPHA = 1e-5
# The normal deviate and the Kolmogorov-Smirnov statistic sqrt(n) * D that are exceeded with probability ALPHA.
Z_THRESHOLD = 4.42
KS_THRESHOLD = math.sqrt(-math.log(ALPHA / 2) / 2)


def kolmogorov_smirnov(samples):
    """sqrt(n) times the largest distance of the empirical distribution of `samples` from U[0, 1]."""
    samples = samples.double().sort().values
    n = len(samples)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * torch.maximum((steps[1:] - samples).max(), (samples - steps[:-1]).max()).item()


def grid(low=1e-3, high=1.0):
    return torch.linspace(low, high, 1000, dtype=torch.float64)


def test_the_schedules_are_the_five_of_the_table():
    assert set(NOISE_SCHEDULES) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_their_table_row(name):
    t = grid().reshape(10, 100)
    p, w = reference.SCHEDULES[name](t)
    torch.testing.assert_close(NOISE_SCHEDULES[name].mask_probability(t), p, rtol=1e-12, atol=0)
    torch.testing.assert_close(NOISE_SCHEDULES[name].loss_weight(t), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_weight_is_the_log_derivative_of_the_mask_probability(name):
    # w = -alpha' / (1 - alpha) = p' / p. The cosine row alone divides by p + eps; the powers floor p at eps, below
    # which p is flat, so the claim is made above it.
    t = grid(low=0.05).requires_grad_()
    p = NOISE_SCHEDULES[name].mask_probability(t)
    (derivative,) = torch.autograd.grad(p.sum(), t)
    w = NOISE_SCHEDULES[name].loss_weight(t)
    expected = derivative / (p + EPS if name == "cosine" else p)
    torch.testing.assert_close(w, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_autograd_and_central_differences_agree_on_the_derivative(name):
    t, h = grid(low=0.05, high=0.99), 1e-5
    schedule = NOISE_SCHEDULES[name]
    slope = (schedule.mask_probability(t + h) - schedule.mask_probability(t - h)) / (2 * h)
    p = schedule.mask_probability(t)
    torch.testing.assert_close(
        schedule.loss_weight(t), slope / (p + EPS if name == "cosine" else p), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_mask_probability_never_falls_and_ends_at_one(name):
    p = NOISE_SCHEDULES[name].mask_probability(grid(low=0.0))
    assert (p.diff() >= 0).all() and p.min() >= 0
    assert abs(p[-1].item() - 1) < 1e-12


@pytest.mark.parametrize(("name", "t"), [("square", 0.01), ("square_root", 1e-7)])
def test_power_schedules_mask_at_least_with_probability_eps(name, t):
    assert NOISE_SCHEDULES[name].mask_probability(torch.tensor(t)).item() == pytest.approx(EPS)


def test_sigma_is_minus_log_of_the_probability_to_survive():
    p = torch.tensor([0.0, 0.5, 1 - math.exp(-1), 0.99, 1.0])
    expected = torch.tensor([0.0, math.log(2), 1.0, math.log(100), math.log(1000)])
    torch.testing.assert_close(sigma_from_mask_probability(p), expected)


@pytest.mark.parametrize(("batch_size", "num_blocks"), [(1, 1), (1, 16), (7, 1), (5, 9)])
def test_antithetic_strata_cover_the_unit_interval_once_per_batch(batch_size, num_blocks):
    num_strata = batch_size * num_blocks
    for seed in range(20):
        t = sample_timesteps(
            batch_size, num_blocks, (0.0, 1.0), generator=torch.Generator().manual_seed(seed)
        ).double()
        assert t.shape == (batch_size, num_blocks)
        strata = (t * num_strata).floor().long().flatten().sort().values
        assert strata.tolist() == list(range(num_strata))


def test_independent_draws_leave_strata_empty():
    # 64 independent draws hit 64 strata with probability 64! / 64^64 < 1e-26.
    t = sample_timesteps(8, 8, (0.0, 1.0), antithetic=False, generator=torch.Generator().manual_seed(0), device=DEVICE)
    assert len((t * 64).floor().unique()) < 64


def marginal_deviations(draw, num_batches=4000):
    """Kolmogorov-Smirnov statistic of each (row, block) over many batches."""
    t = torch.stack([draw() for _ in range(num_batches)])
    return [kolmogorov_smirnov(t[:, row, block]) for row in range(t.shape[1]) for block in range(t.shape[2])]


@pytest.mark.parametrize("antithetic", [True, False])
def test_each_block_has_a_uniform_t_whatever_its_row_and_place(antithetic):
    generator = torch.Generator().manual_seed(1)
    deviations = marginal_deviations(
        lambda: sample_timesteps(3, 4, (0.0, 1.0), antithetic=antithetic, generator=generator, device=DEVICE)
    )
    assert max(deviations) < KS_THRESHOLD


def test_strata_dealt_in_a_fixed_order_would_be_noticed():
    generator = torch.Generator().manual_seed(1)
    in_order = torch.arange(12).view(3, 4)
    deviations = marginal_deviations(lambda: (in_order + torch.rand(3, 4, generator=generator)) / 12, 200)
    assert min(deviations) > KS_THRESHOLD


@pytest.mark.parametrize(("beta", "omega"), [(0.0, 1.0), (0.3, 0.8), (1e-3, 1.0)])
def test_t_is_uniform_on_the_interval(beta, omega):
    t = sample_timesteps(
        64, 64, (beta, omega), antithetic=False, generator=torch.Generator().manual_seed(2), device=DEVICE
    )
    assert beta <= t.min() and t.max() <= omega
    assert kolmogorov_smirnov((t.flatten() - beta) / (omega - beta)) < KS_THRESHOLD


def test_antithetic_strata_are_strata_of_the_interval():
    t = sample_timesteps(4, 8, (0.2, 0.6), generator=torch.Generator().manual_seed(3), device=DEVICE).double()
    strata = ((t - 0.2) / 0.4 * 32).floor().long().flatten().sort().values
    assert strata.tolist() == list(range(32))


def test_an_interval_of_no_width_fixes_t():
    assert sample_timesteps(2, 3, (1.0, 1.0), device=DEVICE).tolist() == [[1.0] * 3] * 2


def test_draws_repeat_with_the_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (
        (
            sample_timesteps(2, 3, (0.0, 1.0), generator=generator, device=DEVICE),
            forward_process(torch.arange(50)[None], torch.tensor(0.5), 99, generator=generator),
        )
        for generator in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, 0.0), (0.5,)])
def test_a_bad_noise_interval_is_named(interval):
    with pytest.raises(ValueError, match=r"`noise_interval`.*0 <= beta <= omega <= 1.*got") as error:
        sample_timesteps(2, 2, interval, device=DEVICE)
    assert str(tuple(interval)) in str(error.value)


def test_forward_process_masks_each_token_with_its_own_probability():
    mask_token_id, rows = 9, 40_000
    p = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
    x_0 = torch.arange(6).expand(rows, 6)
    x_t = forward_process(x_0, p, mask_token_id, generator=torch.Generator().manual_seed(6))
    masked = x_t == mask_token_id
    assert torch.equal(x_t[~masked], x_0[~masked])
    assert not masked[:, 0].any() and masked[:, 5].all()
    rate, p = masked[:, 1:5].double().mean(0), p[1:5].double()
    deviates = (rate - p) / (p * (1 - p) / rows).sqrt()
    assert deviates.abs().max() < Z_THRESHOLD


def test_forward_process_masks_tokens_independently():
    # Pairs of neighbours are both masked with p^2, not with p as they would be if a block shared one draw.
    p, rows = 0.3, 40_000
    x_t = forward_process(
        torch.zeros(rows, 3, dtype=torch.long), torch.full((rows, 1), p), 1, generator=torch.Generator().manual_seed(7)
    )
    for pair in ([0, 1], [1, 2], [0, 2]):
        rate = (x_t[:, pair] == 1).all(-1).double().mean().item()
        assert abs(rate - p**2) < Z_THRESHOLD * math.sqrt(p**2 * (1 - p**2) / rows)
    # Neighbouring rows share no draw either; a row is in two of the pairs.
    rate = ((x_t[1:] == 1) & (x_t[:-1] == 1)).double().mean().item()
    assert abs(rate - p**2) < Z_THRESHOLD * math.sqrt((p**2 * (1 - p**2) + 2 * p**3 * (1 - p)) / (3 * rows))


def test_forward_process_masks_only_where_it_may():
    x_0 = torch.randint(5, (20, 30), generator=torch.Generator().manual_seed(8))
    maskable = torch.rand(20, 30, generator=torch.Generator().manual_seed(9)) < 0.5
    kept = x_0.clone()
    x_t = forward_process(x_0, torch.tensor(1.0), 9, maskable=maskable)
    assert torch.equal(x_t == 9, maskable)
    assert torch.equal(x_t[~maskable], x_0[~maskable])
    assert torch.equal(x_0, kept)


class TestSubs:
    mask_token_id = 5

    def log_probs(self, dtype=torch.float32):
        logits = 3 * torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(10))
        x_t = torch.tensor([[0, 5, 1, 5, 2, 5, 3, 5], [5, 5, 5, 5, 4, 4, 4, 4]])
        return logits, x_t, subs_log_probs(logits.to(dtype), x_t, self.mask_token_id)

    def test_the_mask_token_has_probability_zero(self):
        _, _, log_probs = self.log_probs()
        assert (log_probs[..., self.mask_token_id] == -math.inf).all()

    def test_a_masked_position_is_normalised_and_keeps_the_odds_of_the_logits(self):
        logits, x_t, log_probs = self.log_probs()
        masked = x_t == self.mask_token_id
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 8))
        odds = log_probs[masked][:, :5] - log_probs[masked][:, :1]
        torch.testing.assert_close(odds, logits[masked][:, :5] - logits[masked][:, :1])

    def test_a_revealed_token_stays_with_confidence(self):
        _, x_t, log_probs = self.log_probs()
        revealed = x_t != self.mask_token_id
        assert torch.equal(log_probs.exp()[revealed], torch.nn.functional.one_hot(x_t[revealed], 6).float())

    def test_agrees_with_the_reference(self):
        logits, x_t, log_probs = self.log_probs()
        expected = reference.subs_log_probs(logits.double(), x_t, self.mask_token_id)
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-6)

    def test_half_precision_logits_are_normalised_in_float32(self):
        _, _, log_probs = self.log_probs(torch.bfloat16)
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 8), rtol=0, atol=1e-6)

    def test_the_mask_token_may_be_any_id(self):
        log_probs = subs_log_probs(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), mask_token_id=1)
        third = 1 / 3
        expected = torch.tensor([[[third, 0.0, third, third], [0.0, 0.0, 1.0, 0.0]]])
        torch.testing.assert_close(log_probs.exp(), expected)
