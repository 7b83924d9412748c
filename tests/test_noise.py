"""The noise of training: an unbiased loss whatever the way to mask, each stratum once, the same for a row anywhere."""

import itertools
import math

import pytest
import reference
import torch
from conftest import tiny_config

from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.counts import binomial_probabilities, masked_count_law
from bd3lm_hf.noise.sampler import NoiseSampler


# How many standard errors an average may lie from its expectation: with 40 batches, about 3 false alarms in 10,000.
STANDARD_ERRORS = 4

WAYS = {
    "bernoulli": NoiseSampler(),
    "bernoulli, independent draws": NoiseSampler(antithetic=False),
    "exact count": NoiseSampler(masking="exact_count"),
    "bernoulli, 2 copies": NoiseSampler(num_copies=2),
    "exact count, 3 copies": NoiseSampler(masking="exact_count", num_copies=3),
    "complementary": NoiseSampler(num_copies=2, complementary=True),
    "bernoulli, 2 copies, t of a row": NoiseSampler(num_copies=2, noise_level_per="row"),
    "complementary, t of a document": NoiseSampler(num_copies=2, complementary=True, noise_level_per="document"),
}
way = pytest.mark.parametrize("sampler", WAYS.values(), ids=WAYS)


def text(num_rows, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(22, (num_rows, length), generator=generator)


def draw(sampler, x_0, interval=(1e-3, 1.0), rows=None, num_rows=None, seed=(0,), labels=None, config=None, **kwargs):
    """Noise of the rows `x_0` of a batch, which are all of them by default, under a tiny configuration."""
    config = config or tiny_config(ignore_bos=False, **kwargs)
    blocks = TextBlocks.of_batch(config, x_0, x_0 if labels is None else labels)
    rows = range(len(x_0)) if rows is None else rows
    return sampler.draw(config, interval, x_0, blocks, rows, num_rows or len(x_0), seed)


def masks(noise, x_0):
    """Which tokens are masked, bool [batch, copies, length]."""
    return (noise.x_t == tiny_config().mask_token_id).unflatten(1, (-1, x_0.shape[1]))


def cells(interval, points=200_001):
    """Midpoints of fine cells of the interval and their shares of it; they crowd towards its start."""
    edges = torch.linspace(0, 1, points, dtype=torch.float64) ** 4
    beta, omega = interval
    return beta + (omega - beta) * (edges[1:] + edges[:-1]) / 2, edges.diff()


class TestMaskedCountLaw:
    @pytest.mark.parametrize("num_tokens", [1, 4, 16, 128, 1024])
    def test_on_the_whole_interval_k_masked_tokens_weigh_one_over_k(self, num_tokens):
        law = masked_count_law(num_tokens, "loglinear", (0.0, 1.0))
        k = torch.arange(1, num_tokens + 1, dtype=torch.float64)
        torch.testing.assert_close(torch.from_numpy(law.weight[1:]), 1 / k, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            torch.from_numpy(law.probability), torch.full((num_tokens + 1,), 1 / (num_tokens + 1)).double()
        )

    @pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.3, 0.8), (0.7, 0.75)])
    @pytest.mark.parametrize("schedule", reference.SCHEDULES)
    def test_equals_direct_quadrature(self, schedule, interval):
        num_tokens = 5
        law = masked_count_law(num_tokens, schedule, interval)
        t, share = cells(interval)
        p, w = reference.SCHEDULES[schedule](t)
        for k in range(num_tokens + 1):
            binomial = math.comb(num_tokens, k) * p**k * (1 - p) ** (num_tokens - k)
            assert law.probability[k] == pytest.approx((share * binomial).sum().item(), rel=1e-5)
            if k:
                # The reference's own integral, over the losses of masks of which one costs 1.
                rate = reference.interval_nelbo({tuple(range(k)): 1.0}, num_tokens, schedule, interval).item()
                assert law.weight[k] == pytest.approx(math.comb(num_tokens, k) * rate, rel=1e-5)
                assert law.squared_weight[k] == pytest.approx((share * w**2 * binomial).sum().item(), rel=1e-4)

    def test_an_interval_of_one_t_has_its_binomial_law(self):
        law = masked_count_law(4, "loglinear", (0.5, 0.5))
        assert law.probability.tolist() == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])
        assert law.weight.tolist() == pytest.approx([0, 8 / 16, 12 / 16, 8 / 16, 2 / 16])

    def test_no_masked_token_has_no_weight(self):
        law = masked_count_law(4, "cosine", (0.1, 0.9))
        assert law.weight[0] == law.squared_weight[0] == law.positive_probability[0] == 0 < law.probability[0]
        assert law.positive_probability.sum() == pytest.approx(1)

    def test_binomial_probabilities_at_the_ends(self):
        certain = binomial_probabilities(3, torch.tensor([0.0, 1.0]))
        assert certain.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


class TestMeanLoss:
    """
    Averages over draws against the sum over all masks, for losses that differ from mask to mask and token to token.

    Two blocks, of 4 and of 2 tokens.
    """

    sizes, num_batches, batch_size = (4, 2), 40, 50

    @pytest.fixture(scope="class")
    @classmethod
    def token_losses(cls):
        """For each block, the loss of each token under each of its masks [2^size, size]; 0 where it is not masked."""
        generator, tables = torch.Generator().manual_seed(0), []
        for size in cls.sizes:
            subsets = torch.tensor(list(itertools.product([0, 1], repeat=size)))
            tables.append(subsets * 5 * torch.rand(subsets.shape, generator=generator, dtype=torch.float64) ** 2)
        return tables

    def exact_mean(self, token_losses, schedule, interval, of_t):
        """Sum over masks of E_t[w(t) p^k (1 - p)^(size - k) of_t(t)] times their loss."""
        t, share = cells(interval)
        p, w = reference.SCHEDULES[schedule](t)
        total = 0.0
        for size, table in zip(self.sizes, token_losses, strict=True):
            for mask, losses in zip(itertools.product([0, 1], repeat=size), table, strict=True):
                rate = (share * w * of_t(t) * p ** sum(mask) * (1 - p) ** (size - sum(mask))).sum()
                total += rate.item() * losses.sum().item()
        return total

    def mean_and_error(self, sampler, token_losses, interval, of_t, **overrides):
        config = tiny_config(ignore_bos=False, **overrides)
        x_0, means = text(self.batch_size, length=6), []
        for seed in range(self.num_batches):
            noise = draw(sampler, x_0, interval, seed=(seed,), config=config)
            masked, weights = masks(noise, x_0), noise.loss_weights.unflatten(1, (-1, 6)).double()
            total, start = 0, 0
            for number, (size, table) in enumerate(zip(self.sizes, token_losses, strict=True)):
                block = slice(start, start + size)
                place_values = 2 ** torch.arange(size - 1, -1, -1)
                losses = table[(masked[..., block] * place_values).sum(-1)]
                factor = of_t(noise.t[..., number].double())[..., None] if config.time_conditioning else 1
                total = total + (losses * weights[..., block].nan_to_num(posinf=0) * factor).sum((-1, -2))
                start += size
            means.append(total.mean())
        means = torch.stack(means)
        return means.mean().item(), (means.std() / math.sqrt(len(means))).item()

    @pytest.mark.parametrize("schedule, interval", [("loglinear", (0.05, 1.0)), ("cosine", (0.2, 0.7))])
    @way
    def test_is_the_same_for_every_way_to_mask(self, sampler, schedule, interval, token_losses):
        mean, error = self.mean_and_error(sampler, token_losses, interval, None, noise_schedule=schedule)
        expected = self.exact_mean(token_losses, schedule, interval, torch.ones_like)
        assert abs(mean - expected) < STANDARD_ERRORS * error
        # The check has teeth: a mean one tenth off would not pass it.
        assert STANDARD_ERRORS * error < 0.1 * expected

    @pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
    @pytest.mark.parametrize("noise_level_per", ["block", "row"])
    def test_with_uniform_weights_is_that_of_the_masked_tokens(self, masking, noise_level_per, token_losses):
        sampler = NoiseSampler(masking=masking, noise_level_per=noise_level_per, loss_weight="uniform")
        mean, error = self.mean_and_error(sampler, token_losses, (0.2, 0.9), None, noise_schedule="cosine")
        expected = self.exact_mean(
            token_losses, "cosine", (0.2, 0.9), lambda t: 1 / reference.SCHEDULES["cosine"](t)[1]
        )
        assert abs(mean - expected) < STANDARD_ERRORS * error < 0.1 * expected

    @pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
    @pytest.mark.parametrize("num_copies", [1, 2])
    def test_of_a_model_that_reads_t_is_the_mean_over_t(self, masking, num_copies, token_losses):
        def of_t(t):
            return (3 * t).exp()

        sampler = NoiseSampler(masking=masking, num_copies=num_copies)
        mean, error = self.mean_and_error(sampler, token_losses, (0.1, 1.0), of_t, time_conditioning=True)
        expected = self.exact_mean(token_losses, "loglinear", (0.1, 1.0), of_t)
        assert abs(mean - expected) < STANDARD_ERRORS * error < 0.1 * expected

    def test_exact_counts_vary_less(self, token_losses):
        errors = [
            self.mean_and_error(NoiseSampler(masking=masking), token_losses, (1e-3, 1.0), None)[1]
            for masking in ("bernoulli", "exact_count")
        ]
        assert errors[1] < errors[0] / 2


class TestStrata:
    """5 rows of 4 blocks."""

    x_0 = text(5, length=16)

    def strata(self, t, interval):
        """Numbers of the strata, as many as there are t, that these fall into."""
        beta, omega = interval
        return ((t.flatten().double() - beta) / (omega - beta) * t.numel()).floor().long().sort().values

    @pytest.mark.parametrize("num_copies", [1, 2, 3])
    @pytest.mark.parametrize("time_conditioning, masking", [(False, "bernoulli"), (True, "exact_count")])
    def test_t_meets_each_once_over_rows_blocks_and_copies(self, num_copies, time_conditioning, masking):
        sampler = NoiseSampler(masking=masking, num_copies=num_copies)
        noise = draw(sampler, self.x_0, (0.3, 0.8), time_conditioning=time_conditioning)
        assert noise.t.shape == (5, num_copies, 4)
        assert self.strata(noise.t, (0.3, 0.8)).tolist() == list(range(20 * num_copies))

    def test_independent_draws_do_not(self):
        noise = draw(NoiseSampler(antithetic=False), self.x_0, (0.3, 0.8))
        assert self.strata(noise.t, (0.3, 0.8)).tolist() != list(range(20))

    def test_the_copies_of_a_block_share_out_the_interval(self):
        t = draw(NoiseSampler(num_copies=4), self.x_0, (0.0, 1.0)).t
        assert torch.equal((4 * t).floor().sort(dim=1).values, torch.arange(4.0)[:, None].expand(5, 4, 4))

    def test_exact_counts_meet_each_number_in_proportion(self):
        # On the whole interval the numbers 1 to 4 are equally likely.
        noise = draw(NoiseSampler(masking="exact_count"), self.x_0, (0.0, 1.0))
        counts = masks(noise, self.x_0).unflatten(-1, (4, 4)).sum(-1)
        assert counts.flatten().bincount().tolist() == [0, 5, 5, 5, 5]

    def test_complementary_counts_meet_each_number_in_proportion(self):
        noise = draw(NoiseSampler(num_copies=2, complementary=True), self.x_0, (0.0, 1.0))
        counts = masks(noise, self.x_0)[:, 0].unflatten(-1, (4, 4)).sum(-1)
        assert counts.flatten().bincount().tolist() == [4, 4, 4, 4, 4]

    def test_what_shares_a_t_meets_each_once(self):
        t = draw(NoiseSampler(noise_level_per="row", num_copies=2), self.x_0, (0.3, 0.8)).t
        assert torch.equal(t, t[..., :1].expand_as(t))
        assert self.strata(t[..., 0], (0.3, 0.8)).tolist() == list(range(10))
        # Two documents in each row, of 7 and of 9 tokens: blocks of 4, 3, 4, 4 and 1.
        position_ids = torch.cat([torch.arange(7), torch.arange(9)]).expand(5, -1)
        config = tiny_config(ignore_bos=False)
        blocks = TextBlocks.of_batch(config, self.x_0, self.x_0, position_ids=position_ids)
        sampler = NoiseSampler(noise_level_per="document")
        t = sampler.draw(config, (0.3, 0.8), self.x_0, blocks, range(5), 5, (0,)).t[:, 0]
        assert torch.equal(t, t[:, [0, 0, 2, 2, 2]]) and (t[:, 0] != t[:, 2]).all()
        assert self.strata(t[:, [0, 2]], (0.3, 0.8)).tolist() == list(range(10))

    def test_every_block_can_get_every_stratum(self):
        first = [draw(NoiseSampler(), self.x_0, (0.0, 1.0), seed=(seed,)).t[0, 0, 0].item() for seed in range(300)]
        # 20 strata, 300 draws: one is missed by chance once in 200,000 times.
        assert {int(20 * t) for t in first} == set(range(20))


class TestMasks:
    x_0 = text(64, length=16)

    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_exact_count_leaves_no_block_without_a_masked_token(self, time_conditioning):
        def empty_blocks(masking):
            noise = draw(NoiseSampler(masking=masking), self.x_0, (0.05, 0.3), time_conditioning=time_conditioning)
            return (~masks(noise, self.x_0).unflatten(-1, (4, 4)).any(-1)).sum().item()

        assert empty_blocks("exact_count") == 0 < empty_blocks("bernoulli")

    def test_complementary_copies_predict_each_token_once(self):
        labels = self.x_0.masked_fill(torch.arange(16) < 6, -100)
        noise = draw(WAYS["complementary"], self.x_0, (0.3, 0.8), labels=labels)
        assert torch.equal(masks(noise, self.x_0).sum(1), (labels != -100).long())

    @way
    def test_prompts_are_never_masked(self, sampler):
        is_prompt = torch.rand(self.x_0.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        labels = self.x_0.masked_fill(is_prompt, -100)
        labels[0] = -100
        noise = draw(sampler, self.x_0, (0.5, 1.0), labels=labels)
        masked = masks(noise, self.x_0)
        assert not masked[(labels == -100)[:, None].expand_as(masked)].any()
        assert masked.any(1)[labels != -100].float().mean() > 0.5
        assert torch.equal(noise.x_t.view(masked.shape)[~masked], self.x_0[:, None].expand_as(masked)[~masked])

    def test_at_t_1_all_other_tokens_are(self):
        labels = self.x_0.masked_fill(torch.arange(16) < 6, -100)
        noise = draw(NoiseSampler(), self.x_0, (1.0, 1.0), labels=labels)
        assert torch.equal(masks(noise, self.x_0)[:, 0], labels != -100)

    @pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
    def test_a_model_that_reads_t_is_told_the_t_of_each_block(self, masking):
        noise = draw(NoiseSampler(masking=masking, num_copies=2), self.x_0, (0.2, 0.9), time_conditioning=True)
        sigma = -torch.log1p(-noise.t).repeat_interleave(4, dim=-1).flatten(1)
        torch.testing.assert_close(noise.timesteps, sigma)
        assert draw(NoiseSampler(), self.x_0).timesteps is None


class TestTheSameNoiseAnywhere:
    x_0 = text(8)

    @way
    def test_however_the_rows_are_cut_into_batches(self, sampler):
        whole = draw(sampler, self.x_0)
        for cuts in ([3, 5], [1] * 8):
            rows = torch.arange(8).split(cuts)
            parts = [draw(sampler, self.x_0[part], rows=range(part[0], part[-1] + 1), num_rows=8) for part in rows]
            for name in ("x_t", "loss_weights", "t"):
                found = torch.cat([getattr(part, name) for part in parts])
                torch.testing.assert_close(found, getattr(whole, name), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("side", ["left", "right"])
    @way
    def test_whatever_is_padded(self, sampler, side):
        alone, pad = draw(sampler, self.x_0), torch.zeros(8, 7, dtype=torch.long)
        padded = torch.cat([pad, self.x_0] if side == "left" else [self.x_0, pad], dim=1)
        ones = torch.ones_like(self.x_0)
        is_real = torch.cat([pad, ones] if side == "left" else [ones, pad], dim=1)
        config = tiny_config(ignore_bos=False)
        labels = padded.masked_fill(is_real == 0, -100)
        blocks = TextBlocks.of_batch(config, padded, labels, attention_mask=is_real)
        noise = sampler.draw(config, (1e-3, 1.0), padded, blocks, range(8), 8, (0,))
        real = is_real.bool()[:, None].expand(-1, sampler.num_copies, -1).flatten(1)
        assert torch.equal(noise.x_t[real], alone.x_t.flatten())
        assert torch.equal(noise.loss_weights[real], alone.loss_weights.flatten())
        assert not noise.loss_weights[~real].any()
        assert torch.equal(noise.x_t[~real], pad.repeat(1, sampler.num_copies).flatten())

    def test_whatever_torch_draws_meanwhile(self):
        torch.manual_seed(0)
        first, state = draw(NoiseSampler(), self.x_0), torch.get_rng_state()
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(5)
        assert torch.equal(draw(NoiseSampler(), self.x_0).x_t, first.x_t)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @way
    def test_on_another_device(self, sampler):
        here, there = draw(sampler, self.x_0), draw(sampler, self.x_0.cuda())
        assert torch.equal(there.x_t.cpu(), here.x_t) and torch.equal(there.loss_weights.cpu(), here.loss_weights)

    @way
    def test_but_other_rows_and_seeds_get_other_noise(self, sampler):
        same_rows = self.x_0[:1].expand(8, -1)
        assert len(draw(sampler, same_rows).x_t.unique(dim=0)) > 4
        drawn = [draw(sampler, self.x_0, seed=seed).x_t for seed in [(0,), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 0, 1)]]
        assert not any(torch.equal(*pair) for pair in itertools.combinations(drawn, 2))


class TestErrors:
    @pytest.mark.parametrize(
        "sampler, overrides, message",
        [
            (NoiseSampler(masking="exact"), {}, "`masking` must be one of bernoulli, exact_count, but got 'exact'"),
            (NoiseSampler(noise_level_per="token"), {}, "`noise_level_per` must be one of block, row, document, but"),
            (NoiseSampler(loss_weight="none"), {}, "`loss_weight` must be one of nelbo, uniform, but got 'none'"),
            (NoiseSampler(num_copies=0), {}, "`num_noise_samples` must be at least 1, but got 0"),
            (NoiseSampler(complementary=True), {}, "`complementary_masks` takes `num_noise_samples` = 2.*got 1"),
            (NoiseSampler(num_copies=3, complementary=True), {}, "`complementary_masks` takes.*got 3"),
            (
                WAYS["complementary"],
                {"time_conditioning": True},
                "must not read the time.*`time_conditioning` is True",
            ),
        ],
    )
    def test_what_can_not_be_drawn_is_refused(self, sampler, overrides, message):
        with pytest.raises(ValueError, match=message):
            draw(sampler, text(2), **overrides)
