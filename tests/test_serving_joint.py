"""Requests that are sampled alike take their steps together, and get no other text by it than each alone."""

import random

import pytest
import torch
from serving import BROKEN, ask, check, make_adapted, make_model, prompt, run_all, step_with_a_broken_slot

from bd3lm_hf.modeling.prediction_block_diffusion import TokenPredictor
from bd3lm_hf.modeling.samplers_block_diffusion import ConfidenceSampler
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Ended, Failed, Written


SETTINGS = (
    {"top_p": 0.9},
    {"sampler": "confidence", "denoising_steps": 2},
    {"sampler": "confidence", "confidence_threshold": 0.1, "sub_block_size": 2, "temperature": 0.8},
    {"sampler": "entropy_bound", "entropy_bound": 2.0, "suppress_tokens": [1, 2, 3]},
    {"sampler": "sequential", "do_sample": False},
)
SLIDING = {"head_dim": 8, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "own": lambda: make_model(),
    "time_conditioning": lambda: make_model(time_conditioning=True),
    "eager": lambda: make_model(),
    "shifted": lambda: make_adapted(shift_logits=True),
    "shifted and causal": lambda: make_adapted(shift_logits=True, clean_attention="causal"),
    "sliding": lambda: make_adapted(SLIDING, model_type="gemma3_text", shift_logits=True),
}


class Predictions:
    """Counts the calls of `TokenPredictor.predict`."""

    def __init__(self, monkeypatch):
        self.number, predict = 0, TokenPredictor.predict

        def counted(*arguments, **options):
            self.number += 1
            return predict(*arguments, **options)

        monkeypatch.setattr(TokenPredictor, "predict", counted)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_texts_that_are_sampled_alike_stay_what_each_is_alone(kind, monkeypatch, caplog):
    model, rng, predictions = MODELS[kind](), random.Random(0), Predictions(monkeypatch)
    if kind == "eager":
        model.set_attn_implementation("eager")
    last = min(model.config.mask_token_id, 99)
    # Longer than the window, of a few blocks, and of less than one.
    lengths = [1, 2, 3, 6, 11, 30, 75]
    asked = []
    for seed in range(20):
        ids = [rng.randrange(1, last) for _ in range(rng.choice(lengths))]
        asked.append(ask(ids, rng.choice([3, 9, 14]), seed, **SETTINGS[seed % len(SETTINGS)]))
    engine = Engine(model, EngineLimits(num_slots=10, max_length=128))
    for request, _ in asked:
        engine.submit(request)
        # So that they are in different phases of their blocks.
        for _ in range(rng.randrange(2)):
            engine.step()
    run_all(engine)
    num_predictions = predictions.number
    for request, events in asked:
        check(model, request, events)
    assert not caplog.records
    # Alone each takes as many as forwards.
    assert num_predictions < 0.8 * engine.counts.row_forwards


@torch.no_grad()
def test_equal_requests_cost_one_prediction_a_forward(monkeypatch):
    model, predictions = make_model(), Predictions(monkeypatch)
    engine = Engine(model, EngineLimits(num_slots=8, max_length=64))
    asked = [ask([1 + seed, 2, 3, 4], 16, seed, top_p=0.9, eos_token_id=100) for seed in range(8)]
    engine.submit(*(request for request, _ in asked))
    run_all(engine)
    assert predictions.number == engine.counts.forwards == 16
    assert engine.counts.row_forwards == 8 * 16


class OneMore(ConfidenceSampler):
    """A sampler of one's own, which keeps what the engine can't know of."""

    def reveal(self, candidates, confidence):
        self.tokens_per_step = self.tokens_per_step % 3 + 1
        return super().reveal(candidates, confidence)


class NoneOf:
    """A processor of one's own, which bans a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


@torch.no_grad()
def test_samplers_and_processors_of_ones_own_are_asked_alone():
    model = make_model()
    engine = Engine(model, EngineLimits(num_slots=9, max_length=64))
    asked = [ask([1 + seed, 2, 3], 14, seed, sampler=OneMore()) for seed in range(3)]
    asked += [ask([1, 2, 3], 14, seed, logits_processor=[NoneOf(seed + 8)]) for seed in range(3)]
    asked += [ask([1, 2, 3], 14, seed) for seed in range(3)]
    engine.submit(*(request for request, _ in asked))
    run_all(engine)
    for request, events in asked:
        check(model, request, events)


@torch.no_grad()
def test_of_requests_that_are_sampled_alike_one_fails_alone():
    model = make_model()
    model.get_input_embeddings().weight[BROKEN] = torch.nan
    engine, rng = Engine(model, EngineLimits(num_slots=6, max_length=64)), random.Random(1)
    options = {"suppress_tokens": [BROKEN], "eos_token_id": 100}
    good = [ask(prompt(rng, 6), 16, seed, **options) for seed in range(4)]
    bad, bad_events = ask([1, 2, BROKEN, 4, 5, 6], 16, 9, **options)
    engine.submit(good[0][0], good[1][0], bad, good[2][0], good[3][0])
    run_all(engine)
    assert isinstance(bad_events[-1], Failed) and "NaN" in str(bad_events[-1].error)
    for request, events in good:
        check(model, request, events)


@torch.no_grad()
def test_a_forward_that_fails_for_one_of_several_settings_fails_for_no_other(monkeypatch):
    model = make_model()
    engine = Engine(model, EngineLimits(num_slots=6, max_length=64))
    asked = [ask([1 + seed, 2, 3], 12, seed, eos_token_id=100, top_p=0.9 - seed % 2 / 10) for seed in range(6)]
    engine.submit(*(request for request, _ in asked))
    for _ in range(3):
        engine.step()
    step_with_a_broken_slot(engine, 3, monkeypatch)
    run_all(engine)
    assert [type(events[-1]) is Failed for _, events in asked].count(True) == 1
    for request, events in asked:
        if isinstance(events[-1], Ended):
            check(model, request, events)


@torch.no_grad()
def test_log_probabilities_are_each_request_s_own_where_others_want_none():
    model = make_model()
    engine = Engine(model, EngineLimits(num_slots=5, max_length=64))
    asked = [ask([1 + seed, 2, 3], 11, seed, eos_token_id=100, wants_reveal=seed % 2 == 1) for seed in range(5)]
    engine.submit(*(request for request, _ in asked))
    run_all(engine)
    for request, events in asked:
        check(model, request, events)
        written = [event.log_probabilities for event in events if isinstance(event, Written)]
        if not request.wants_reveal:
            assert written == [None] * len(written) and events[-1].log_probabilities is None
            continue
        options = {**request.options, "return_dict_in_generate": True, "output_reveal": True}
        output = model.generate(torch.tensor([request.input_ids]), max_new_tokens=11, **options)
        wanted = output.token_probabilities[0, 3:].log()
        told = torch.tensor([value for values in written for value in values])
        torch.testing.assert_close(told, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_newcomer_waits_for_two_forwards_at_most_in_whichever_phases_others_are(monkeypatch):
    model, rng = make_model(), random.Random(2)
    engine = Engine(model, EngineLimits(num_slots=17, max_length=128))
    others = [ask(prompt(rng, 1 + seed), 100, seed, eos_token_id=100) for seed in range(16)]
    newcomers, waited, forward = [], [], engine._slots.forward

    def watched(calls):
        # What is asked for while a forward runs waits for those that the engine was at.
        if not newcomers:
            newcomers.append(ask(prompt(rng, 20), 4, 99, eos_token_id=100))
            engine.submit(newcomers[0][0])
            waited.append(0)
        elif not any(cache is newcomer_cache() for call in calls for cache in call.caches):
            waited[0] += not newcomer_has_begun[0]
        else:
            newcomer_has_begun[0] = True
        return forward(calls)

    newcomer_has_begun = [False]

    def newcomer_cache():
        rows = [row for row in engine._rows if newcomers and row.request is newcomers[0][0]]
        return rows[0].cache if rows else None

    for request, _ in others:
        engine.submit(request)
        engine.step()
    for _ in range(6):
        newcomers.clear(), waited.clear()
        newcomer_has_begun[0] = False
        monkeypatch.setattr(engine._slots, "forward", watched)
        num_steps = 0
        while not (newcomers and any(isinstance(event, Written) for event in newcomers[0][1])):
            engine.step()
            num_steps += 1
        monkeypatch.undo()
        # The one that it came in, and one more; then its own prefill, which is its block's first step, and three more,
        # of which the first shares a forward at once.
        assert waited[0] + 1 <= 2 and num_steps == 1 + 3
        check(model, *newcomers[0])
        engine.step()


@pytest.mark.parametrize("time_conditioning", [False, True])
@torch.no_grad()
def test_pieces_of_several_long_prompts_share_forwards_with_each_other_and_with_blocks(time_conditioning, caplog):
    model, rng = make_model(time_conditioning=time_conditioning), random.Random(3)
    # Pieces of 512 tokens, and a first block that follows 508.
    lengths = (1100, 1100, 1101, 508, 508, 212, 216, 221)
    asked = [ask(prompt(rng, length), 6, length + seed, eos_token_id=100) for seed, length in enumerate(lengths)]
    engine = Engine(model, EngineLimits(num_slots=8, max_length=1200))
    engine.submit(*(request for request, _ in asked))
    run_all(engine)
    for request, events in asked:
        check(model, request, events)
    assert not caplog.records


@torch.no_grad()
def test_a_short_prompt_does_not_wait_for_the_whole_of_long_ones(caplog):
    model, rng = make_model(), random.Random(4)
    engine = Engine(model, EngineLimits(num_slots=4, max_length=2048))
    first, _ = ask(prompt(rng, 3), 60, 0, eos_token_id=100)
    long = [ask(prompt(rng, 1900), 4, seed, eos_token_id=100) for seed in range(2)]
    short, events = ask(prompt(rng, 100), 4, 3, eos_token_id=100)
    engine.submit(first)
    engine.step()
    engine.submit(*(request for request, _ in long), short)
    num_steps = 0
    while not any(isinstance(event, Written) for event in events):
        engine.step()
        num_steps += 1
    # One piece of the oldest at most, then its own.
    assert num_steps <= 1 + 4 and not any(isinstance(event, Written) for _, told in long for event in told)
    run_all(engine)
    for request, told in (*long, (short, events)):
        check(model, request, told)
