"""The engine gives each request what `generate` gives for it alone, and lets requests in and out at any forward."""

import random
import threading
import time

import pytest
import torch
from serving import (
    BROKEN,
    ask,
    check,
    make_adapted,
    make_model,
    prompt,
    run_all,
    step_with_a_broken_slot,
    wait_for_end,
)
from transformers import StoppingCriteriaList

from bd3lm_hf.serving import slots
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Began, Draft, Ended, Failed, QueueFull, Request, Written


SAMPLERS = (
    {},
    {"sampler": "ancestral", "denoising_steps": 3},
    {"sampler": "ancestral", "denoising_steps": 3, "remask_cap": 0.5},
    {"sampler": "confidence", "denoising_steps": 2},
    {"sampler": "confidence", "confidence_threshold": 0.1, "confidence": "margin"},
    {"sampler": "entropy_bound", "entropy_bound": 2.0},
    {"do_sample": False},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"sequence_bias": [[[5], 4.0], [[9, 11], -3.0]]},
    {"repetition_penalty": 1.3, "min_new_tokens": 6},
)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("kind", ["time_conditioning", "window and eager", "shifted", "causal and not shifted"])
@torch.no_grad()
def test_every_text_is_the_one_that_generate_writes_alone(kind, caplog):
    if "shifted" in kind:
        fields = {"clean_attention": "causal"} if "causal" in kind else {}
        model = make_adapted(shift_logits="not" not in kind, **fields)
    else:
        model = make_model(time_conditioning=kind == "time_conditioning")
    window = "window" in kind
    if window:
        model.set_attn_implementation("eager")
    rng = random.Random(0)
    last = min(model.config.mask_token_id, 99)
    asked = []
    for seed in range(15):
        length = rng.choice([1, 3, 8, 17, 40, 600 if window else 90])
        ids = [rng.randrange(1, last) for _ in range(length)]
        if seed % 5 == 4:
            ids = ids + [model.config.mask_token_id] * 3 + ids[:2]
            asked.append(ask(ids, 0, seed, infill=True))
        else:
            options = {**SAMPLERS[(seed - seed // 5) % len(SAMPLERS)]}
            asked.append(ask(ids, rng.choice([1, 5, 12, 20]), seed, **options))
    engine = Engine(model, EngineLimits(num_slots=5, max_length=768))
    for request, _ in asked:
        engine.submit(request)
        # Some join while others are in the middle of a block.
        for _ in range(rng.randrange(3)):
            engine.step()
    run_all(engine)
    for request, events in asked:
        check(model, request, events)
    assert engine.counts.ended == len(asked)
    # Forwards were shared, none of which failed and was run for each.
    assert not caplog.records
    assert engine.counts.forwards < 0.7 * engine.counts.row_forwards


def test_it_works_in_a_thread_of_its_own(model):
    rng = random.Random(1)
    asked = [ask(prompt(rng, 5), 12, seed) for seed in range(8)]
    with Engine(model, EngineLimits(num_slots=3, max_length=64)) as engine:
        for request, _ in asked:
            engine.submit(request)
        for _, events in asked:
            wait_for_end(events)
    for request, events in asked:
        check(model, request, events)
    assert not engine.is_alive
    with pytest.raises(QueueFull, match="closed"):
        engine.submit(ask([1])[0])


def test_an_engine_that_is_being_closed_takes_nothing_on(model):
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    is_at_a_step, may_go_on = threading.Event(), threading.Event()
    engine.step = lambda: is_at_a_step.set() or may_go_on.wait()
    engine.__enter__()
    engine.submit(ask([1])[0])
    is_at_a_step.wait()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.is_alive:
        time.sleep(0.001)
    assert closing.is_alive()
    may_go_on.set()
    closing.join()


@pytest.mark.parametrize("part", ["_drop_cancelled", "_forward", "_positions_of", "_begin"])
def test_nobody_waits_for_an_engine_that_stopped(model, part, monkeypatch):
    def broken(self, *arguments):
        raise RuntimeError("a fault of the engine")

    rng = random.Random(2)
    asked = [ask(prompt(rng, 5), 12, seed) for seed in range(5)]
    with Engine(model, EngineLimits(num_slots=3, max_length=64)) as engine:
        engine.submit(asked[0][0])
        wait_for_end(asked[0][1])
        assert engine.is_alive
        monkeypatch.setattr(Engine, part, broken)
        engine.submit(*(request for request, _ in asked[1:]))
        for _, events in asked[1:]:
            wait_for_end(events)
            assert isinstance(events[-1], Failed)
        engine._thread.join(10)
        assert not engine.is_alive
        with pytest.raises(QueueFull):
            engine.submit(ask([1])[0])


@torch.no_grad()
def test_events_tell_of_drafts_and_of_the_probabilities_of_the_reveal(model):
    request, events = ask([5, 6, 7, 8, 9], 11, 3, wants_reveal=True, wants_drafts=True, eos_token_id=100)
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    engine.submit(request)
    run_all(engine)
    options = {"max_new_tokens": 11, "return_dict_in_generate": True, "output_reveal": True, **request.options}
    output = model.generate(torch.tensor([request.input_ids]), **options)
    wanted = output.token_probabilities[0, 5:].log()
    torch.testing.assert_close(torch.tensor(events[-1].log_probabilities), wanted, atol=1e-4, rtol=1e-4)
    written = [value for event in events if isinstance(event, Written) for value in event.log_probabilities]
    torch.testing.assert_close(torch.tensor(written), wanted, atol=1e-4, rtol=1e-4)
    assert isinstance(events[0], Began)
    assert events[-1].num_forwards == output.num_forward_passes.item() == 11
    drafts = [event.token_ids for event in events if isinstance(event, Draft)]
    assert len(drafts) == 11 and drafts[0].count(model.config.mask_token_id) > drafts[2].count(
        model.config.mask_token_id
    )


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others():
    model = make_model()
    engine = Engine(model, EngineLimits(num_slots=3, max_length=2048, prefill_tokens=256))
    rng = random.Random(2)
    short, short_events = ask(prompt(rng, 4), 64, 0, eos_token_id=100)
    engine.submit(short)
    engine.step()
    long, long_events = ask(prompt(rng, 1800), 4, 1, eos_token_id=100)
    engine.submit(long)
    num_written = []
    while not any(isinstance(event, Written) for event in long_events):
        engine.step()
        num_written.append(sum(len(event.token_ids) for event in short_events if isinstance(event, Written)))
    # Three pieces of 512 tokens, the rest with the first step of the block, which takes three more; the first of those
    # is a forward with the others, at once.
    assert len(num_written) == 4 + 2
    assert num_written[-1] >= 4
    run_all(engine)
    check(model, short, short_events)
    check(model, long, long_events)


@torch.no_grad()
def test_a_newcomer_joins_at_the_next_forward_and_leaves_with_its_last(model):
    engine = Engine(model, EngineLimits(num_slots=2, max_length=64))
    first, _ = ask([1, 2, 3, 4], 40, 0, eos_token_id=100)
    engine.submit(first)
    for _ in range(5):
        engine.step()
    second, events = ask([4, 3, 2, 1], 4, 1, eos_token_id=100)
    engine.submit(second)
    before = engine.counts.forwards
    for num_steps in range(1, 5):
        assert not any(isinstance(event, Ended) for event in events)
        engine.step()
        assert engine.num_running == (2 if num_steps < 4 else 1)
    assert isinstance(events[-1], Ended)
    # Four tokens, one by one: one forward each, of which all but its own prefill are shared.
    assert engine.counts.forwards - before <= 4 + 1


@torch.no_grad()
def test_what_prompts_share_is_read_once_and_the_texts_stay_the_same(model):
    rng = random.Random(3)
    shared = prompt(rng, 41)
    for shift_logits in (None, True):
        one = model if shift_logits is None else make_adapted(shift_logits=True)
        ids = [token % (one.config.mask_token_id - 1) + 1 for token in shared]
        engine = Engine(one, EngineLimits(num_slots=3, max_length=128))
        asked = [ask([*ids, *more], 12, seed) for seed, more in enumerate([[], [5, 6], [9] * 7, [4]])]
        for request, _ in asked:
            engine.submit(request)
            # The next comes while this one is written, so that the slot that holds the text is taken.
            for _ in range(3):
                engine.step()
        run_all(engine)
        again, events = ask([*ids, 3, 3], 12, 9)
        engine.submit(again)
        run_all(engine)
        for request, told in (*asked, (again, events)):
            check(one, request, told)
        block_size = one.config.block_size
        assert engine.counts.reused_tokens >= 4 * (41 // block_size * block_size - block_size)
        # A text that begins otherwise shares nothing.
        before = engine.counts.reused_tokens
        other, events = ask([2, *ids], 12, 9)
        engine.submit(other)
        run_all(engine)
        check(one, other, events)
        assert engine.counts.reused_tokens == before


@torch.no_grad()
def test_admission_keeps_to_the_positions_that_all_may_hold_and_to_the_order(model):
    engine = Engine(model, EngineLimits(num_slots=4, max_length=32, max_positions=40))
    asked = [ask([1, 2], 22, 0, eos_token_id=100), ask([1, 2], 20, 1), ask([1], 3, 2)]
    for request, _ in asked:
        engine.submit(request)
    engine.step()
    # The second does not fit beside the first, and the third does not overtake it.
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    run_all(engine)
    for request, events in asked:
        check(model, request, events)


def test_the_queue_has_a_bound_and_takes_all_or_none(model):
    engine = Engine(model, EngineLimits(num_slots=1, max_length=32, max_queue=2))
    asked = [ask([1], 4, seed) for seed in range(6)]
    engine.submit(asked[0][0], asked[1][0])
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.submit(asked[2][0], asked[3][0])
    engine.submit(asked[2][0])
    with pytest.raises(QueueFull):
        engine.submit(asked[3][0])
    assert (engine.num_waiting, engine.counts.refused) == (3, 3)
    with torch.no_grad():
        run_all(engine)
    for request, events in asked[:3]:
        check(model, request, events)
    with pytest.raises(ValueError, match="`prompt` must have 1 to 32 tokens with the 30 new ones, but got 3"):
        engine.submit(ask([1, 2, 3], 30)[0])
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, or 0 with `infill`, but got 0"):
        engine.submit(ask([1, 2, 3], 0)[0])


@torch.no_grad()
def test_a_cancelled_request_is_gone_at_the_next_forward_and_nothing_more_is_told_of_it(model):
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    (first, first_events), (second, events), (third, third_events) = (ask([1, 2, 3], 20, seed) for seed in range(3))
    engine.submit(first, second, third)
    for _ in range(6):
        engine.step()
    num_told = len(first_events)
    first.cancel()
    second.cancel()
    engine.step()
    # Its slot is the third's already; the second never had one.
    assert (engine.num_running, engine.num_waiting, engine.counts.cancelled) == (1, 0, 2)
    run_all(engine)
    assert len(first_events) == num_told and not events
    check(model, third, third_events)


class Bad:
    """A processor of one's own that fails at its third call."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("bad processor")
        return scores


@torch.no_grad()
def test_a_request_fails_alone(caplog):
    model = make_model()
    model.get_input_embeddings().weight[BROKEN] = torch.nan
    engine = Engine(model, EngineLimits(num_slots=4, max_length=64))
    rng = random.Random(4)
    # Nobody else is to write that token.
    fine = {"suppress_tokens": [BROKEN]}
    good = [ask(prompt(rng, 6), 16, seed, **fine) for seed in range(2)]
    not_a_number, nan_events = ask([1, 2, BROKEN, 4, 5, 6], 16, 5)
    processor, processor_events = ask([1, 2, 3], 16, 6, logits_processor=[Bad()])
    engine.submit(good[0][0], not_a_number, processor, good[1][0])
    for _ in range(4):
        engine.step()
    run_all(engine)
    # The slots of those that failed hold numbers that are none, of which others must not see a trace.
    later = [ask(prompt(rng, length), 12, length, **fine) for length in (2, 9, 13, 30)]
    engine.submit(*(request for request, _ in later))
    run_all(engine)
    for request, events in (*good, *later):
        check(model, request, events)
    for events, message in ((nan_events, "NaN"), (processor_events, "bad processor")):
        assert isinstance(events[-1], Failed) and message in str(events[-1].error) and not events[-1].is_refused
    assert engine.counts.failed == 2


@torch.no_grad()
def test_numbers_that_are_none_do_not_outlive_a_request_that_is_cancelled():
    model = make_model()
    model.get_input_embeddings().weight[BROKEN] = torch.nan
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    # In a whole block that is read first, and in the block that is written.
    for ids in ([1, 2, 3, 4, BROKEN, 6, 7, 8, 9], [1, 2, 3, 4, BROKEN]):
        bad, bad_events = ask(ids, 16, 5)
        engine.submit(bad)
        engine.step()
        bad.cancel()
        fine, events = ask([1, 2, 3, 4, 5], 12, 1, suppress_tokens=[BROKEN])
        engine.submit(fine)
        run_all(engine)
        assert not any(isinstance(event, (Ended, Failed)) for event in bad_events)
        check(model, fine, events)


@torch.no_grad()
def test_a_cancelled_request_leaves_what_it_read_to_the_next(model):
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    ids = prompt(random.Random(5), 24)
    left, _ = ask(ids, 16, 5)
    again, events = ask(ids, 16, 6)
    engine.submit(left)
    for _ in range(3):
        engine.step()
    left.cancel()
    engine.submit(again)
    run_all(engine)
    check(model, again, events)
    assert engine.counts.reused_tokens == 24


@torch.no_grad()
def test_a_forward_that_fails_at_its_end_is_run_again_and_commits_once(model, monkeypatch):
    engine = Engine(model, EngineLimits(num_slots=3, max_length=64))
    asked = [ask(prompt(random.Random(seed), 9 + seed), 12, seed) for seed in range(3)]
    engine.submit(*(request for request, _ in asked))
    failures = [RuntimeError("out of memory")]

    make = slots.Scores

    def scores(logits):
        if failures:
            raise failures.pop()
        return make(logits)

    monkeypatch.setattr(slots, "Scores", scores)
    run_all(engine)
    for request, events in asked:
        check(model, request, events)


@torch.no_grad()
def test_a_forward_that_fails_for_one_is_run_again_for_the_others(model, monkeypatch):
    engine = Engine(model, EngineLimits(num_slots=3, max_length=64))
    asked = [ask([1 + seed, 2, 3], 12, seed, eos_token_id=100) for seed in range(3)]
    engine.submit(*(request for request, _ in asked))
    for _ in range(3):
        engine.step()
    step_with_a_broken_slot(engine, 1, monkeypatch)
    run_all(engine)
    kinds = [type(events[-1]) for _, events in asked]
    assert sorted(kind.__name__ for kind in kinds) == ["Ended", "Ended", "Failed"]
    for request, events in asked:
        if isinstance(events[-1], Ended):
            check(model, request, events)


@torch.no_grad()
def test_what_generate_refuses_is_refused_and_holds_nobody_up(model):
    engine = Engine(model, EngineLimits(num_slots=2, max_length=64))
    refused = [
        ask([1, 2], 4, sampler="nonsense"),
        ask([1, 2], 4, entropy_bound=1.0),
        ask([1, 100, 2], 4),
        ask([1, 101], 4),
    ]
    fine, events = ask([1, 2], 4)
    engine.submit(*(request for request, _ in refused), fine)
    run_all(engine)
    for _, told in refused:
        assert [type(event) for event in told] == [Failed] and told[0].is_refused
    check(model, fine, events)
    assert len(engine._slots.free) == 2


@torch.no_grad()
def test_a_text_without_a_gap_ends_as_it_is(model):
    engine = Engine(model, EngineLimits(num_slots=2, max_length=64))
    (whole, whole_events), (fine, events) = ask([1, 2, 3, 4, 5], 0, infill=True), ask([1, 2], 12)
    engine.submit(whole, fine)
    run_all(engine)
    assert whole_events[-1].token_ids == [1, 2, 3, 4, 5] and whole_events[-1].num_forwards == 0
    check(model, fine, events)


@torch.no_grad()
def test_texts_as_long_as_a_slot_fit_wherever_their_prompts_end():
    for one in (make_model(), make_adapted(shift_logits=True)):
        engine = Engine(one, EngineLimits(num_slots=2, max_length=32))
        asked = [ask([1 + seed] * length, 32 - length, seed) for seed, length in enumerate((1, 15, 16, 17, 30, 31))]
        engine.submit(*(request for request, _ in asked))
        run_all(engine)
        for request, events in asked:
            check(one, request, events)


@torch.no_grad()
def test_blocks_that_are_counted_from_the_prompt_s_end_share_nothing(model):
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    ids = prompt(random.Random(6), 17)
    for seed, options in enumerate(({}, {"new_block": True}, {}, {"new_block": True})):
        request, events = ask(ids, 9, seed, **options)
        engine.submit(request)
        run_all(engine)
        check(model, request, events)


@torch.no_grad()
def test_no_bias_has_the_mask_token_written(model):
    request, events = ask([1, 2], 12, sequence_bias=[[[model.config.mask_token_id], 100.0]])
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    engine.submit(request)
    run_all(engine)
    check(model, request, events)
    assert model.config.mask_token_id not in events[-1].token_ids


@torch.no_grad()
def test_a_listener_that_fails_ends_its_request_alone(model):
    engine = Engine(model, EngineLimits(num_slots=2, max_length=64))
    fine, events = ask([1, 2], 12)
    engine.submit(Request([1, 2, 3], 12, lambda event: 1 / 0, {"seed": 0}), fine)
    run_all(engine)
    check(model, fine, events)
    assert engine.counts.cancelled == 1


def test_limits_and_models_that_can_not_be_served_are_refused(model):
    for name, value in (("num_slots", 0), ("max_length", -1), ("max_queue", -1), ("prefill_tokens", 1.5)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            EngineLimits(**{name: value})
    with pytest.raises(ValueError, match="`max_positions` must be at least `max_length`, 64, but got 8"):
        EngineLimits(max_length=64, max_positions=8)
    flex = make_model()
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="must be 'sdpa' or 'eager' to serve, but got 'flex_attention'"):
        Engine(flex)


@torch.no_grad()
def test_what_can_not_even_begin_or_end_fails_alone(model):
    class Once:
        """A criterion of one's own that fails once the text is written."""

        def __call__(self, input_ids, scores, **kwargs):
            if scores is None and input_ids.shape[1] == 2 + 8:
                self.calls = getattr(self, "calls", 0) + 1
                if self.calls == 2:
                    raise RuntimeError("asked twice")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    engine = Engine(model, EngineLimits(num_slots=3, max_length=64))
    no_ids, no_id_events = ask([2**70, 1], 4)
    criterion, criterion_events = ask([1, 2], 8, stopping_criteria=StoppingCriteriaList([Once()]), eos_token_id=100)
    fine, events = ask([1, 2], 12)
    engine.submit(no_ids, criterion, fine)
    run_all(engine)
    assert isinstance(no_id_events[-1], Failed) and isinstance(criterion_events[-1], Failed)
    check(model, fine, events)
    assert len(engine._slots.free) == 3
