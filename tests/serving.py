"""A tiny model and its tokenizer behind a server on the loopback interface."""

from contextlib import contextmanager

import torch
from adapted import byte_tokenizer
from conftest import random_model

from bd3lm_hf.serving.api import make_app
from bd3lm_hf.serving.engine import Engine, EngineLimits
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
def running(model, tokenizer, limits=None, api_key=KEY, **options):
    """A server of a model: the engine, and the address of its API."""
    engine = Engine(model, limits or EngineLimits(num_slots=4, max_length=256))
    with BackgroundServer(make_app(engine, tokenizer, NAME, api_key, **options)) as server:
        yield engine, server.url
