"""Tiny models in an engine, and behind a server on the loopback interface; requests of the engine."""

import time
from contextlib import contextmanager

import torch
from adapted import adapted_lm, byte_tokenizer
from conftest import random_model

from bd3lm_hf.serving.api import make_app
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Ended, Failed, Request, Written
from bd3lm_hf.serving.running import BackgroundServer


NAME, KEY = "tiny", "secret-key"
# The roles are what a text may hold, so that every chat has a template.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def make_tiny(logit_std=4.0, **overrides):
    """A model of bytes whose logits are far apart, and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.chat_template = TEMPLATE
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, **ids, **overrides}
    model = random_model(attn_implementation="sdpa", **fields)
    with torch.no_grad():
        for part in (model.lm_head.weight, model.lm_head.bias):
            part.mul_(logit_std)
    return model, tokenizer


@contextmanager
def running(model, tokenizer, limits=None, api_key=KEY, adapters=None, **options):
    """A server of a model: the engine, and the address of its API."""
    engine = Engine(model, limits or EngineLimits(num_slots=4, max_length=256), adapters)
    with BackgroundServer(make_app(engine, tokenizer, NAME, api_key, **options)) as server:
        yield engine, server.url


SPECIAL = {"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": 0}
# The embedding of this token is no number in `test_a_request_fails_alone`.
BROKEN = 13


def make_model(**overrides):
    return random_model(attn_implementation="sdpa", vocab_size=101, max_position_embeddings=64, **SPECIAL, **overrides)


def make_adapted(overrides=None, **options):
    # Positions are the network's own, and rotary ones go on.
    fields = {"vocab_size": 101, "max_position_embeddings": 1024, **SPECIAL, **(overrides or {})}
    return adapted_lm(overrides=fields, block_size=4, **options)


def ask(input_ids, max_new_tokens=8, seed=0, **options):
    """A request, and the list of events that it is told."""
    events = []
    wants = {name: options.pop(name) for name in ("wants_reveal", "wants_drafts") if name in options}
    return Request(input_ids, max_new_tokens, events.append, {"seed": seed, **options}, **wants), events


def prompt(rng, length):
    return [rng.choice([token for token in range(1, 99) if token != BROKEN]) for _ in range(length)]


def alone(model, request):
    """What `generate` writes for a request alone: its new tokens."""
    length = {"max_new_tokens": request.max_new_tokens} if request.max_new_tokens else {}
    text = model.generate(torch.tensor([request.input_ids]), **length, **request.options)[0].tolist()
    return text if request.options.get("infill") else text[len(request.input_ids) :]


def run_all(engine, most_steps=10_000):
    """Steps until nobody waits or writes."""
    for _ in range(most_steps):
        if not (engine.num_waiting or engine.num_running):
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def check(model, request, events):
    wanted = alone(model, request)
    assert isinstance(events[-1], Ended) and events[-1].token_ids == wanted
    written = [token for event in events if isinstance(event, Written) for token in event.token_ids]
    assert written == wanted or request.options.get("infill")


def wait_for_end(events, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if events and isinstance(events[-1], (Ended, Failed)):
            return
        time.sleep(0.002)
    raise AssertionError(f"no end came, but {events}")


@contextmanager
def held(engine, num_forwards=60):
    """Within it an engine runs so many forwards and no more: a text that takes longer does not end by itself."""
    forward, left = engine._forward, num_forwards

    def forward_or_wait(rows):
        nonlocal left
        if rows and not left:
            return time.sleep(0.001)
        left -= bool(rows)
        forward(rows)

    engine._forward = forward_or_wait
    try:
        yield
    finally:
        del engine._forward


def save_tiny(tiny, folder):
    """The model and its tokenizer in a folder of their own."""
    for part in tiny:
        part.save_pretrained(folder)
    return folder


def save_adapter(make, folder, seed, **options):
    """A LoRA adapter that changes a model much, with dropout that would be seen in training mode."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, **options
    )
    peft.get_peft_model(make(), config).save_pretrained(folder)
    return folder


def step_with_a_broken_slot(engine, slot, monkeypatch):
    """A step in which every forward that reads a slot runs out of memory."""
    doomed, forward = engine._slots.caches[slot], engine._slots.forward

    def fails(calls):
        if any(doomed in call.caches for call in calls):
            raise RuntimeError("out of memory")
        return forward(calls)

    with monkeypatch.context() as patch:
        patch.setattr(engine._slots, "forward", fails)
        engine.step()
