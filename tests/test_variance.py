"""How much the loss varies with its noise: figures against enumeration and brute force, and errors that are errors."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import DEVICE, random_model, tiny_config

from bd3lm_hf import BD3LMForMaskedLM, NoiseSampler
from bd3lm_hf.evaluation.block_losses import BlockLosses
from bd3lm_hf.evaluation.estimate import Estimate
from bd3lm_hf.evaluation.variance import gradient_variance, nelbo_variance
from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.intervals import noise_interval_grid


# How many standard errors a figure may lie from the true one: 1 false alarm in 16,000 for a normal error.
STANDARD_ERRORS = 4
LENGTH, BLOCK_SIZE = 16, 4
MASKINGS = pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])


def markov_text(num_rows, seed):
    """Rows in which three of four tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(8, (num_rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        random = torch.randint(8, (num_rows,), generator=generator)
        follows = torch.rand(num_rows, generator=generator) < 0.75
        rows.append(torch.where(follows, (3 * rows[-1] + 1) % 8, random))
    return torch.stack(rows, dim=1)


@pytest.fixture(scope="module")
def model():
    """Trained for a few seconds, so that a token costs the less the more of its block is known."""
    torch.manual_seed(0)
    model = BD3LMForMaskedLM(
        tiny_config(vocab_size=9, num_hidden_layers=1, initializer_range=0.15, noise_interval=(0.5, 1.0))
    )
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        x_0 = markov_text(32, seed=step)
        loss = model(input_ids=x_0, labels=x_0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Knowing nothing costs log 8 = 2.08.
    assert loss < 1.3
    return model.eval()


@pytest.fixture(scope="module")
def sequences():
    return markov_text(200, seed=10_000)


@pytest.fixture(scope="module")
def subset_losses(model, sequences):
    """For each block, its size and the reference's loss under each of its masks {subset: [rows]}."""
    state, found = model.state_dict(), []

    def logits_of(x_t):
        return reference.two_stream_logits(state, model.config, x_t, sequences)

    for start in range(0, LENGTH, BLOCK_SIZE):
        # The first token of a row is not predicted.
        block = range(max(start, 1), start + BLOCK_SIZE)
        losses = reference.block_subset_losses(logits_of, sequences, block, model.config.mask_token_id)
        found.append((len(block), losses))
    return found


def exact_moments(subset_losses, interval, masking="bernoulli", schedule="loglinear"):
    """Mean over blocks of the mean and of the mean square of a block's loss per token, by enumeration of its masks."""
    beta, omega = interval
    edges = torch.linspace(0, 1, 20_001, dtype=torch.float64) ** 4
    t, share = beta + (omega - beta) * (edges[1:] + edges[:-1]) / 2, edges.diff()
    p, w = reference.SCHEDULES[schedule](t)
    moments = []
    for size, losses in subset_losses:
        rates = []
        for k in range(1, size + 1):
            of_one_mask = share * p**k * (1 - p) ** (size - k)
            rates.append(torch.stack([(of_one_mask * weight).sum() for weight in (1, w, w**2)]))
        any_masked = sum(math.comb(size, k) * probability for k, (probability, *_) in enumerate(rates, start=1))
        first, second = 0, 0
        for subset, loss in losses.items():
            probability, weight, square = rates[len(subset) - 1]
            if masking == "exact_count":
                square = weight**2 * any_masked / probability
            first, second = first + weight * loss / size, second + square * (loss / size) ** 2
        moments.append(torch.stack([first, second]).mean(-1))
    return torch.stack(moments).mean(0).tolist()


def exact_variance(subset_losses, *args):
    first, second = exact_moments(subset_losses, *args)
    return second - first**2


def deviates(samples, expected):
    """By how many standard errors the mean of independent `samples` lies from `expected`."""
    samples = np.array(samples)
    return (samples.mean() - expected) / (samples.std(ddof=1) / math.sqrt(len(samples)))


class TestVarianceOfIntervals:
    @pytest.fixture(scope="class")
    @classmethod
    def one_pass(cls, model, sequences):
        return BlockLosses.of_sequences(model, sequences, seed=1, batch_size=50, progress=False)

    def test_the_grid_is_that_of_the_paper(self):
        grid = noise_interval_grid()
        assert len(set(grid)) == len(grid) == 36 and grid[0] == (1e-3, 1.0)
        assert {(0.45, 0.95), (0.3, 0.8), (1e-3, 0.5), (0.5, 1.0), (0.1, 1.0), (1e-3, 0.9)} < set(grid)
        assert all(0 < beta < omega <= 1 for beta, omega in grid)

    @pytest.fixture(scope="class")
    @classmethod
    def passes(cls, model, sequences):
        return [
            BlockLosses.of_sequences(model, sequences, seed=seed, batch_size=200, progress=False) for seed in range(20)
        ]

    @MASKINGS
    def test_from_single_passes_averages_to_that_of_an_enumeration(self, masking, passes, subset_losses):
        for interval in noise_interval_grid():
            exact = exact_variance(subset_losses, interval, masking)
            samples = [losses.variance(interval, masking).value for losses in passes]
            assert abs(deviates(samples, exact)) < STANDARD_ERRORS, interval
            # The check has teeth: nothing else would pass that is as far off as a tenth.
            assert abs(deviates(samples, 1.1 * exact)) > STANDARD_ERRORS, interval

    @MASKINGS
    def test_from_one_pass_agrees_with_brute_force(self, masking, one_pass, model, sequences):
        # From t = 0.05 on: below, a brute force of thousands of blocks meets too few t near 0 to know its own error.
        for number, interval in enumerate(interval for interval in noise_interval_grid() if interval[0] >= 0.05):
            brute_force = nelbo_variance(
                model, sequences, interval, masking=masking, num_draws=2, seed=number, batch_size=200, progress=False
            )
            difference = one_pass.variance(interval, masking) - brute_force
            assert abs(difference.value) < STANDARD_ERRORS * difference.standard_error, interval
            assert difference.standard_error < 0.3 * brute_force.value, interval

    @MASKINGS
    def test_brute_force_agrees_with_an_enumeration(self, masking, model, sequences, subset_losses):
        for interval in ((0.3, 0.8), (0.1, 1.0)):
            samples = [
                nelbo_variance(
                    model, sequences, interval, masking=masking, seed=seed, batch_size=200, progress=False
                ).value
                for seed in range(20)
            ]
            assert abs(deviates(samples, exact_variance(subset_losses, interval, masking))) < STANDARD_ERRORS

    @pytest.mark.parametrize("schedule, best", [("loglinear", (0.5, 1.0)), ("square", (1e-3, 0.5))])
    def test_the_search_finds_what_an_enumeration_finds(
        self, schedule, best, model, sequences, subset_losses, monkeypatch
    ):
        monkeypatch.setattr(model.config, "noise_schedule", schedule)
        one_pass = BlockLosses.of_sequences(model, sequences, batch_size=200, progress=False)
        chosen, variances = one_pass.least_variance_interval()
        brute_force, exact = {}, {}
        for number, interval in enumerate(noise_interval_grid()):
            brute_force[interval] = nelbo_variance(
                model, sequences, interval, seed=number, batch_size=200, progress=False
            ).value
            exact[interval] = exact_variance(subset_losses, interval, "bernoulli", schedule)
        assert chosen == min(exact, key=exact.get) == best
        # A brute force of one draw may take a neighbour of the least, which the enumeration tells.
        least, most = min(exact.values()), max(exact.values())
        assert exact[min(brute_force, key=brute_force.get)] < 1.2 * least < 0.9 * most
        assert variances[chosen].value == min(estimate.value for estimate in variances.values())

    def test_the_search_for_exact_counts_finds_one_of_the_least(self, model, sequences, subset_losses):
        # Several intervals lie within a hundredth of the least.
        exact = {
            interval: exact_variance(subset_losses, interval, "exact_count") for interval in noise_interval_grid()
        }
        one_pass = BlockLosses.of_sequences(model, sequences, num_draws=4, batch_size=200, progress=False)
        chosen, _ = one_pass.least_variance_interval("exact_count")
        assert exact[chosen] < 1.02 * min(exact.values()) < 0.9 * max(exact.values())

    def test_exact_counts_vary_less(self, one_pass):
        for interval in noise_interval_grid():
            ratio = one_pass.variance(interval, "exact_count") / one_pass.variance(interval)
            assert ratio.value < 1 - STANDARD_ERRORS * ratio.standard_error, interval

    def test_nelbo_averages_to_that_of_an_enumeration(self, passes, subset_losses):
        first = [
            sum(losses[subset] / (len(subset) * math.comb(size, len(subset))) for subset in losses)
            for size, losses in subset_losses
        ]
        exact = torch.stack(first).sum(0).mean() / (LENGTH - 1)
        # The full interval leaves out t < 1e-3 and divides by what is left.
        assert np.mean([losses.nelbo().value for losses in passes]) == pytest.approx(exact.item(), rel=5e-3)

    def test_does_not_depend_on_the_batch_size(self, model, sequences):
        rows = [row[: 9 + index % 8].tolist() for index, row in enumerate(sequences[:20])]
        one, seven = (nelbo_variance(model, rows, (0.2, 0.9), batch_size=size, progress=False) for size in (1, 7))
        assert one.value == pytest.approx(seven.value, rel=1e-4)
        np.testing.assert_allclose(one.influence, seven.influence, rtol=1e-3, atol=1e-6)

    def test_a_bad_interval_or_masking_is_refused(self, model, sequences):
        with pytest.raises(ValueError, match="`noise_interval`.*0 <= beta <= omega <= 1"):
            nelbo_variance(model, sequences, (0.8, 0.3))
        with pytest.raises(ValueError, match="`masking` must be one of"):
            nelbo_variance(model, sequences, (0.3, 0.8), masking="gaussian", progress=False)


class TestTimeConditioning:
    """A model that reads t: the loss at a t depends on more than the number of masked tokens."""

    @MASKINGS
    def test_one_pass_agrees_with_brute_force(self, masking):
        model = random_model(0, "sdpa", vocab_size=9, time_conditioning=True, num_hidden_layers=1)
        rows = markov_text(200, seed=0)
        one_pass = BlockLosses.of_sequences(model, rows, num_draws=4, seed=1, batch_size=200, progress=False)
        assert not np.isnan(one_pass.t).any()
        for interval in ((0.3, 0.8), (0.5, 1.0)):
            brute_force = nelbo_variance(
                model, rows, interval, masking=masking, num_draws=4, batch_size=200, progress=False
            )
            difference = one_pass.variance(interval, masking) - brute_force
            assert abs(difference.value) < STANDARD_ERRORS * difference.standard_error, interval
            assert difference.standard_error < 0.15 * brute_force.value, interval

    def test_an_interval_of_one_t_has_no_variance_that_one_pass_could_tell(self):
        model = random_model(0, "sdpa", vocab_size=9, time_conditioning=True)
        one_pass = BlockLosses.of_sequences(model, markov_text(8, seed=0), progress=False)
        assert math.isnan(one_pass.variance((1.0, 1.0)).value)


class TestStandardErrors:
    def test_are_calibrated_over_samples_of_sequences(self, model, sequences, subset_losses):
        # Of 200 sequences samples of 50 with replacement: as from a source whose figures are known.
        first, _ = exact_moments(subset_losses, (1e-3, 1.0))
        generator, z = np.random.default_rng(0), {"variance": [], "nelbo": []}
        sizes = np.array([size for size, _ in subset_losses])
        exact_nelbo = (
            sum(
                size * exact_moments([block], (1e-3, 1.0))[0] for size, block in zip(sizes, subset_losses, strict=True)
            )
            / sizes.sum()
        )
        exact = exact_variance(subset_losses, (0.3, 0.8))
        for seed in range(60):
            rows = sequences[generator.integers(len(sequences), size=50)]
            losses = BlockLosses.of_sequences(model, rows, seed=seed, batch_size=50, progress=False)
            variance, nelbo = losses.variance((0.3, 0.8)), losses.nelbo()
            z["variance"].append((variance.value - exact) / variance.standard_error)
            z["nelbo"].append((nelbo.value - exact_nelbo) / nelbo.standard_error)
        for name, values in z.items():
            # Their standard deviation over 60 samples is known to about 9 %. That of stratified draws may be smaller.
            assert 0.7 < np.std(values) < 1.3, name
            assert abs(np.mean(values)) < STANDARD_ERRORS / math.sqrt(60), name

    def test_differences_and_ratios_are_paired(self):
        generator = np.random.default_rng(0)
        common, own = generator.normal(size=(2, 1000)) / 1000
        first = Estimate(3.0, common)
        second = Estimate(2.0, common + 0.1 * own)
        assert (first - first).standard_error == 0 and (first / first).standard_error == 0
        assert (first - second).value == 1 and (first / second).value == 1.5
        assert (first - second).standard_error == pytest.approx(0.1 * np.std(own) * math.sqrt(1000), rel=0.01)
        assert first.standard_error == pytest.approx(np.std(common, ddof=1) * math.sqrt(1000), rel=0.01)

    def test_one_sequence_has_none(self, model, sequences):
        assert math.isnan(nelbo_variance(model, sequences[:1], (0.3, 0.8), progress=False).standard_error)


class TestGradientVariance:
    def batches(self, number, batch_size=4):
        rows = markov_text(number * batch_size, seed=7)
        return [{"input_ids": ids, "labels": ids} for ids in rows.split(batch_size)]

    @pytest.mark.parametrize("sampler", [NoiseSampler(masking="exact_count"), NoiseSampler(num_copies=2)])
    def test_equals_the_direct_computation(self, model, sampler):
        batches, gradients = self.batches(6), []
        for number, batch in enumerate(batches):
            x_0 = batch["input_ids"]
            blocks = TextBlocks.of_batch(model.config, **batch)
            noise = sampler.draw(model.config, (0.3, 0.8), x_0, blocks, range(4), 4, (5, number))
            loss = model(**{**batch, **noise.inputs(x_0)}).loss
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            gradients.append(torch.cat([part.flatten() for part in found if part is not None]).double())
        gradients = torch.stack(gradients)
        variance = gradient_variance(model, batches, (0.3, 0.8), noise_sampler=sampler, seed=5, progress=False)
        assert variance.value == pytest.approx(gradients.var(0).sum().item(), rel=1e-4)
        distances = (gradients - gradients.mean(0)).square().sum(1) * 6 / 5
        assert variance.standard_error == pytest.approx((distances.std() / math.sqrt(6)).item(), rel=1e-4)

    def test_takes_the_interval_of_the_config_and_so_many_batches(self, model, monkeypatch):
        monkeypatch.setattr(model.config, "noise_interval", (0.4, 0.6))
        batches = self.batches(5)
        default = gradient_variance(model, batches, num_batches=3, progress=False)
        given = gradient_variance(model, batches[:3], (0.4, 0.6), progress=False)
        assert default.value == given.value != gradient_variance(model, batches, (0.4, 0.6), progress=False).value

    def test_of_one_batch_is_that_of_its_noise(self):
        # At block size 1 and t = 1 there is none.
        model = random_model(0, "sdpa", block_size=1)
        batch = self.batches(1)[0]
        assert gradient_variance(model, [batch] * 3, (1.0, 1.0), progress=False).value == pytest.approx(0, abs=1e-9)
        assert gradient_variance(model, [batch] * 3, (0.3, 0.8), progress=False).value > 1e-4
        assert gradient_variance(model, self.batches(3), (1.0, 1.0), progress=False).value > 1e-4

    def test_leaves_mode_gradients_and_random_state_as_they_were(self):
        model = random_model(0, "sdpa", hidden_dropout=0.5).train()
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        state = torch.get_rng_state()
        first = gradient_variance(model, self.batches(3), (0.3, 0.8), progress=False)
        assert first.value == gradient_variance(model, self.batches(3), (0.3, 0.8), progress=False).value
        assert model.training and torch.equal(state, torch.get_rng_state())
        assert (model.lm_head.weight.grad == 1).all() and model.model.embed_tokens.weight.grad is None

    def test_its_standard_error_is_calibrated(self, model):
        # 24 samples of 8 batches of 2 rows: their spread is known to about 15 %.
        samples = [
            gradient_variance(
                model,
                [{"input_ids": ids} for ids in markov_text(16, seed=100 + seed).split(2)],
                (0.5, 1.0),
                seed=seed,
                progress=False,
            )
            for seed in range(24)
        ]
        spread = np.std([sample.value for sample in samples], ddof=1)
        reported = math.sqrt(np.mean([sample.standard_error**2 for sample in samples]))
        assert 0.6 < spread / reported < 1.6

    def test_clipping_and_exact_counts_lower_it(self, model):
        batches = self.batches(30)
        full, clipped, exact_count = (
            gradient_variance(model, batches, interval, noise_sampler=sampler, progress=False)
            for interval, sampler in (
                ((1e-3, 1.0), NoiseSampler()),
                ((0.5, 1.0), NoiseSampler()),
                ((1e-3, 1.0), NoiseSampler(masking="exact_count")),
            )
        )
        for ratio in (clipped / full, exact_count / full):
            assert ratio.value < 1 - 3 * ratio.standard_error

    def test_what_can_not_be_averaged_is_refused(self, model):
        batches = self.batches(2)
        with pytest.raises(ValueError, match="`batches` must be iterable twice.*list_iterator"):
            gradient_variance(model, iter(batches))
        with pytest.raises(ValueError, match="`batches` must be at least two, but got 1"):
            gradient_variance(model, batches[:1], progress=False)
        with pytest.raises(ValueError, match="`noise_interval`.*0 <= beta <= omega <= 1"):
            gradient_variance(model, batches, (0.8, 0.3))
        with pytest.raises(ValueError, match="`masking` must be one of"):
            gradient_variance(model, batches, noise_sampler=NoiseSampler(masking="x"), progress=False)
