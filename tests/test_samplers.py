"""Each sampler draws from the distribution that it claims, and costs the forwards that it claims."""

import pytest
import reference
import torch
from conftest import random_model
from test_first_hitting import (
    ALPHA,
    BATCH_SIZE,
    CERTAINLY_WRONG,
    EOS,
    MASK,
    NUM_SAMPLES,
    chi_square_p_value,
    conditionals_of,
    enumerated,
    model,  # noqa: F401
)

from bd3lm_hf import BD3LMGenerationConfig
from bd3lm_hf.modeling.prediction_block_diffusion import sample_tokens
from bd3lm_hf.modeling.samplers_block_diffusion import (
    SAMPLERS,
    AncestralSampler,
    BlockNoise,
    ConfidenceSampler,
    Sampler,
)


PROMPT, LENGTH = [0, 2], 4


def levels_of(schedule, num_steps):
    """p(t) from t = 1 down to 0, by the reference's schedules; the ends are 1 and 0."""
    t = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    p, _ = reference.SCHEDULES[schedule](t)
    return [1.0, *p[1:-1].tolist(), 0.0]


def distribution_of(model, **kwargs):  # noqa: F811
    """That of the block after the prompt under the ancestral sampler."""
    start = (*PROMPT, MASK, MASK)
    return reference.ancestral_distribution(conditionals_of(model), start, frozenset({2, 3}), **kwargs)


def sampled(model, seed=0, **kwargs):  # noqa: F811
    torch.manual_seed(seed)
    prompts = torch.tensor([PROMPT]).expand(BATCH_SIZE, -1)
    mask = torch.ones_like(prompts)
    arguments = {"max_new_tokens": LENGTH - len(PROMPT), "suppress_tokens": [EOS], **kwargs}
    runs = [model.generate(prompts, attention_mask=mask, **arguments) for _ in range(NUM_SAMPLES // BATCH_SIZE)]
    return torch.cat(runs)


@pytest.mark.parametrize("schedule", ["loglinear", "square"])
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_ancestral_steps_have_their_own_distribution(model, num_steps, schedule):  # noqa: F811
    distribution = distribution_of(model, levels=levels_of(schedule, num_steps))
    assert sum(distribution.values()) == pytest.approx(1)
    samples = sampled(model, sampler="ancestral", denoising_steps=num_steps, noise_schedule=schedule)
    assert chi_square_p_value(samples, distribution) > ALPHA


def test_a_single_ancestral_step_is_told_from_many(model):  # noqa: F811
    samples = sampled(model, sampler="ancestral", denoising_steps=1)
    assert chi_square_p_value(samples, distribution_of(model, levels=levels_of("loglinear", 8))) < CERTAINLY_WRONG


def test_many_ancestral_steps_come_to_first_hitting(model):  # noqa: F811
    first_hitting = enumerated(model, PROMPT, LENGTH)
    distances = []
    for num_steps in (1, 2, 8, 64, 512):
        steps = distribution_of(model, levels=levels_of("loglinear", num_steps))
        distances.append(sum(abs(steps[text] - probability) for text, probability in first_hitting.items()) / 2)
    # Two tokens are revealed in the same step with probability 1 / steps.
    assert all(later < 0.6 * earlier for earlier, later in zip(distances, distances[1:]))
    assert distances[-1] < 1e-3


def test_the_largest_number_draws_a_token_that_has_a_probability():
    scores = torch.randn(20_000, 9, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 7:] = -torch.inf
    ids, total = sample_tokens(scores, torch.full((20_000,), 1 - 2**-24))
    assert ids.max() == 6 and (total > 1).any() and (total < 1).any()
    ids, total = sample_tokens(torch.full((1, 9), -torch.inf), torch.zeros(1))
    assert total.isnan() and ids < 9


@pytest.mark.parametrize("cap", [0.3, 1.0])
def test_remasking_has_its_own_distribution(model, cap):  # noqa: F811
    levels = levels_of("loglinear", 4)
    distribution = distribution_of(model, levels=levels, remask_cap=cap)
    samples = sampled(model, sampler="ancestral", denoising_steps=4, remask_cap=cap)
    assert chi_square_p_value(samples, distribution) > ALPHA


@pytest.mark.parametrize("cap", [0.0, 0.3, 1.0])
def test_the_masked_fraction_keeps_to_the_schedule_whatever_is_masked_again(cap):
    torch.manual_seed(0)
    # One row, which has no step without a token.
    masked = torch.ones(1, 200_000, dtype=torch.bool)
    sampler = AncestralSampler(5, remask_cap=cap)
    sampler.start(masked, BlockNoise(None, [], masked.shape, masked.device))
    levels = levels_of("loglinear", 5)

    def agrees(observed, expected):
        error = observed.float().std() / observed.numel() ** 0.5
        return abs(observed.float().mean() - expected) <= 4.5 * error

    for before, after in zip(levels, levels[1:]):
        assert not sampler.is_finished(masked)
        known, candidates = ~masked, sampler.candidates(masked)
        remasked = sampler.remask(known)
        masked = masked & ~candidates
        assert not (remasked & ~known).any()
        if before < 1:
            assert agrees(remasked[known], min(cap, after / (1 - before)))
        masked = masked | remasked
        assert agrees(masked, after)
    assert sampler.is_finished(masked) and not masked.any()


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
@pytest.mark.parametrize(("argument", "value"), [("temperature", 0.6), ("top_p", 0.7)])
def test_processors_act_inside_the_conditionals(model, sampler, argument, value):  # noqa: F811
    plain = conditionals_of(model)

    def processed(ids):
        rows = {}
        for position, probabilities in plain(ids).items():
            p = torch.tensor(probabilities, dtype=torch.float64)
            if argument == "temperature":
                p = p ** (1 / value)
            else:
                order = p.argsort(descending=True)
                # The smallest set of the likeliest tokens that has this probability.
                kept = p[order].cumsum(0) - p[order] < value
                p = torch.zeros_like(p).scatter(0, order[kept], p[order[kept]])
            rows[position] = (p / p.sum()).tolist()
        return rows

    start, masked = (*PROMPT, MASK, MASK), frozenset({2, 3})
    if sampler == "ancestral":
        distribution = reference.ancestral_distribution(processed, start, masked, levels_of("loglinear", 2))
        kwargs = {"denoising_steps": 2}
    else:
        distribution, kwargs = reference.first_hitting_distribution(processed, start, masked), {}
    samples = sampled(model, sampler=sampler, **{argument: value}, **kwargs)
    distribution = {text: probability for text, probability in distribution.items() if probability > 0}
    assert chi_square_p_value(samples, distribution) > ALPHA


@pytest.fixture(scope="module")
def larger():
    return random_model(seed=1, attn_implementation="sdpa", block_size=16, eos_token_id=None, pad_token_id=0)


class TestForwards:
    """What a step costs."""

    def run(self, model, **kwargs):  # noqa: F811
        prompts = torch.randint(22, (3, 16), generator=torch.Generator().manual_seed(0))
        return model.generate(prompts, max_new_tokens=32, return_dict_in_generate=True, seed=7, **kwargs)

    def test_a_step_that_reveals_nothing_costs_no_forward(self, larger):
        forwards = {
            steps: self.run(larger, sampler="ancestral", denoising_steps=steps).num_forward_passes
            for steps in (1, 4, 1024)
        }
        assert forwards[1].tolist() == [2, 2, 2]
        assert (forwards[4] <= 8).all()
        # Of 1024 steps most reveal nothing.
        assert (forwards[1024] <= 32).all() and (forwards[1024] >= 28).all()

    def test_an_entropy_bound_of_nothing_reveals_the_most_certain_token_alone(self, larger):
        bound = self.run(larger, sampler="entropy_bound", entropy_bound=0.0)
        one_by_one = self.run(larger, sampler="confidence", confidence="negative_entropy")
        assert torch.equal(bound.sequences, one_by_one.sequences)
        assert bound.num_forward_passes.tolist() == [32, 32, 32]

    def test_a_larger_entropy_bound_costs_fewer_forwards(self, larger):
        forwards = [
            self.run(larger, sampler="entropy_bound", entropy_bound=bound).num_forward_passes.sum()
            for bound in (0.0, 2.0, 8.0, 1000.0)
        ]
        assert forwards == sorted(forwards, reverse=True)
        assert forwards[-1] == 6 and len(set(forwards)) == 4

    def test_as_many_steps_as_tokens_equal_a_threshold_of_one(self, larger):
        threshold = self.run(larger, sampler="confidence", confidence_threshold=1.0)
        # More steps than tokens are no more than that.
        for number in (16, 17, 2**63):
            steps = self.run(larger, sampler="confidence", denoising_steps=number)
            assert torch.equal(steps.sequences, threshold.sequences)

    @pytest.mark.parametrize("confidence", ["probability", "margin", "negative_entropy"])
    def test_each_confidence_reveals_in_an_order_of_its_own(self, larger, confidence):
        others = {"probability", "margin", "negative_entropy"} - {confidence}
        mine = self.run(larger, sampler="confidence", denoising_steps=8, confidence=confidence).sequences
        for other in others:
            theirs = self.run(larger, sampler="confidence", denoising_steps=8, confidence=other).sequences
            assert not torch.equal(mine, theirs)


class TestRevealOrder:
    """`output_reveal`, for plots and for study."""

    def test_first_hitting_reveals_one_token_per_forward(self, larger):
        prompts = torch.randint(22, (2, 5), generator=torch.Generator().manual_seed(0))
        output = larger.generate(
            prompts, max_new_tokens=20, return_dict_in_generate=True, output_reveal=True, output_logits=True, seed=0
        )
        assert output.reveal_steps.shape == output.token_probabilities.shape == output.sequences.shape
        assert (output.reveal_steps[:, :5] == 0).all() and output.token_probabilities[:, :5].isnan().all()
        for steps in output.reveal_steps[:, 5:]:
            # The prompt fills 5 of the first 16.
            assert sorted(steps[:11].tolist()) == list(range(1, 12))
            assert sorted(steps[11:].tolist()) == list(range(12, 21))
            assert steps.tolist() != sorted(steps.tolist())
        for column in range(20):
            probabilities = output.logits[column].softmax(-1)
            chosen = probabilities.gather(-1, output.sequences[:, 5 + column, None])[:, 0]
            torch.testing.assert_close(output.token_probabilities[:, 5 + column], chosen)

    def test_a_filled_gap_has_its_step_too(self, larger):
        prompt = torch.arange(16)[None].scatter(1, torch.tensor([[3, 9]]), 22)
        output = larger.generate(prompt, infill=True, return_dict_in_generate=True, output_reveal=True)
        assert sorted(output.reveal_steps[0, [3, 9]].tolist()) == [1, 2]
        assert output.reveal_steps.sum() == 3

    def test_it_is_left_out_unless_asked_for(self, larger):
        output = larger.generate(torch.tensor([[1]]), max_new_tokens=2, return_dict_in_generate=True)
        assert output.reveal_steps is None and output.token_probabilities is None


class TestEntropyBound:
    def test_the_revealed_set_is_the_largest_within_the_bound(self):
        entropy = torch.tensor([[0.5, 0.1, 3.0, 0.2], [1.0, 1.0, 1.0, 1.0]])
        candidates = torch.tensor([[True, True, True, True], [True, False, True, True]])
        confidence = (-entropy).masked_fill(~candidates, -torch.inf)
        revealed = {
            bound: SAMPLERS["entropy_bound"](bound).reveal(candidates, confidence) for bound in (0.0, 0.1, 0.3, 1.0)
        }
        # Row 0 in order: 0.1, 0.2, 0.5, 3.0; the sum less the largest: 0, 0.1, 0.3, 0.8.
        assert {bound: mask[0].tolist() for bound, mask in revealed.items()} == {
            0.0: [False, True, False, False],
            0.1: [False, True, False, True],
            0.3: [True, True, False, True],
            1.0: [True, True, True, True],
        }
        assert revealed[0.3].sum(-1).tolist() == [3, 1]
        assert revealed[1.0].sum(-1).tolist() == [4, 2]
        assert not revealed[1.0][1, 1]


class TestTies:
    """Confidences that rounding alone tells apart."""

    @pytest.mark.parametrize("scale", [1.0, 0.1, -8.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_last_bits_do_not_choose(self, dtype, scale):
        generator = torch.Generator().manual_seed(0)
        sampler = ConfidenceSampler(3)
        sampler.tolerance = torch.finfo(dtype).eps ** 0.5
        # Five levels that are told apart in every dtype, so that most positions share theirs.
        level = torch.tensor([0.1, 0.2, 0.35, 0.6, 1.0])[torch.randint(5, (2000, 16), generator=generator)] * scale
        level[torch.rand(level.shape, generator=generator) < 0.2] = -torch.inf
        number = (level > -torch.inf).sum(-1, keepdim=True) // 3
        in_order = level.argsort(dim=-1, descending=True, stable=True)
        expected = torch.zeros_like(level).bool()
        expected.scatter_(1, in_order, torch.arange(16).expand(2000, -1) < number)
        by_sorting = []
        for _ in range(3):
            noise = 1 + 4 * torch.finfo(dtype).eps * (torch.rand(level.shape, generator=generator) - 0.5)
            assert torch.equal(sampler.surest(level * noise, number), expected)
            order = (level * noise).argsort(dim=-1, descending=True, stable=True)
            by_sorting.append(torch.equal(order.gather(1, number), in_order.gather(1, number)))
        assert not any(by_sorting)

    def test_what_is_told_apart_goes_by_confidence(self):
        confidence = torch.rand(500, 16, generator=torch.Generator().manual_seed(0))
        for number in (1, 5, 16):
            surest = SAMPLERS["confidence"](1).surest(confidence, torch.full((500, 1), number))
            assert (surest.sum(-1) == number).all()
            gap = confidence.masked_fill(surest, -1).amax(-1) - confidence.masked_fill(~surest, 2).amin(-1)
            assert (gap < 1e-3).all() and (number == 16 or (gap < 0).float().mean() > 0.98)

    def test_a_certain_model_reveals_the_same_tokens_whether_its_entropy_is_rounded_to_nothing_or_not(self):
        candidates = torch.ones(1, 4, dtype=torch.bool)
        for entropies in ([0.0, 0.0, 0.0, 2.0], [1.2e-7, 0.0, 6e-8, 2.0], [-6e-8, 1.2e-7, 1.2e-7, 2.0]):
            revealed = SAMPLERS["entropy_bound"](0.0).reveal(candidates, -torch.tensor([entropies]))
            assert revealed.tolist() == [[True, True, True, True]]


class RightToLeft(Sampler):
    """Reveals the rightmost masked token."""

    def candidates(self, masked):
        return masked & (masked.flip(-1).cumsum(-1).flip(-1) == 1)


def test_a_sampler_of_ones_own_is_passed_as_an_object_or_by_name(monkeypatch):
    model = random_model(attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)  # noqa: F811
    prompt = torch.tensor([[1, 2, 3, 4]])
    by_object = model.generate(prompt, max_new_tokens=8, sampler=RightToLeft(), seed=0)
    monkeypatch.setitem(SAMPLERS, "right_to_left", RightToLeft)
    assert torch.equal(by_object, model.generate(prompt, max_new_tokens=8, sampler="right_to_left", seed=0))
    assert not torch.equal(by_object, model.generate(prompt, max_new_tokens=8, seed=0))
    # The object itself is left as it was: each block gets a copy.
    sampler = ConfidenceSampler(denoising_steps=2)
    model.generate(prompt, max_new_tokens=8, sampler=sampler)
    assert sampler.steps_left == 2


def test_a_config_with_a_sampler_object_is_shown_but_not_saved(tmp_path):
    class Mine(Sampler):
        pass

    config = BD3LMGenerationConfig(sampler=Mine())
    assert '"sampler": "Mine"' in repr(config)
    with pytest.raises(ValueError, match="`sampler` must be a name in SAMPLERS to be saved, but got a Mine"):
        config.save_pretrained(tmp_path)
