"""Texts that a model writes after the beginnings of held-out ones, and what the source says of them."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.adaptation.workbench import LENGTH, Workbench


# Of so many tokens in a row, how many are there once only: a text that repeats itself is likely, too.
RUN_LENGTH = 4


@torch.no_grad()
def written(
    bench: Workbench, model: PreTrainedModel, prompt_length: int, batch_size: int, **options: Any
) -> dict[str, float]:
    """
    What `model` writes, up to LENGTH tokens, after the first `prompt_length` of each held-out text, where it is surest
    first: the source's `nats` per token of it, with its `standard_error` over the texts; the share of runs of
    RUN_LENGTH tokens that are new in their text (`new_runs`); and `seconds`.

    Args:
        batch_size: texts that are written together.
        options: further arguments of `generate`.
    """
    ids = torch.tensor(bench.text["held_out"]["input_ids"], device=model.device)
    options = {"sampler": "confidence", "eos_token_id": None, "max_new_tokens": LENGTH - prompt_length, **options}
    nats, new_runs, seconds = [], [], 0.0
    for part in ids[:, :prompt_length].split(batch_size):
        start = time.perf_counter()
        texts = model.generate(part, attention_mask=torch.ones_like(part), **options)
        seconds += time.perf_counter() - start
        nats += [judged(bench, few, prompt_length) for few in texts.split(bench.args.batch_size)]
        new_runs += [share_of_new_runs(text[prompt_length:]) for text in texts]
    values = torch.cat(nats)
    return {
        "nats": values.mean().item(),
        "standard_error": (values.std() / len(values) ** 0.5).item(),
        "new_runs": sum(new_runs) / len(new_runs),
        "seconds": seconds,
    }


def judged(bench: Workbench, texts: Tensor, prompt_length: int) -> Tensor:
    """The source's nats per token of texts [batch, length] after their first `prompt_length` tokens, [batch]."""
    with torch.autocast(texts.device.type, enabled=False):
        scores = bench.judge(texts).logits[:, prompt_length - 1 : -1].float().log_softmax(-1)
    return -scores.gather(-1, texts[:, prompt_length:, None]).mean((1, 2))


def share_of_new_runs(text: Tensor) -> float:
    """Of the runs of RUN_LENGTH tokens of a text [length], the share that differ."""
    runs = text.unfold(0, RUN_LENGTH, 1)
    return len(runs.unique(dim=0)) / len(runs)
