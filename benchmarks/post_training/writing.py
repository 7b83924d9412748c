"""Texts that a model writes after the beginnings of held-out ones, and what the source says of them."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bd3lm_hf import evaluate_likelihood
from benchmarks.adaptation.workbench import LENGTH, Workbench, has_fast_bf16, mean, standard_error


# Of so many tokens in a row, how many are there once only: a text that repeats itself is likely, too.
RUN_LENGTH = 4
WAYS = {"greedy": {"do_sample": False}, "nucleus 0.9": {"do_sample": True, "top_p": 0.9}}
# {seed: what [`written`] gave}
BySeed = dict[str, dict[str, Any]]


def written_in_ways(
    bench: Workbench, model: PreTrainedModel, prompt_length: int, numbers: Sequence[int], seed: int
) -> dict[str, dict[str, Any]]:
    """{way: {tokens per forward: what [`written`] gives}}, all texts together; other seeds draw other texts."""
    count = bench.args.num_held_out
    with fast_bf16(bench.args.device):
        return {
            name: {
                str(number): written(
                    bench, model, prompt_length, count, tokens_per_step=number, seed=seed * count, **way
                )
                for number in numbers
            }
            for name, way in WAYS.items()
        }


@torch.no_grad()
def written(
    bench: Workbench, model: PreTrainedModel, prompt_length: int, batch_size: int, **options: Any
) -> dict[str, Any]:
    """
    What `model` writes, up to LENGTH tokens, after the first `prompt_length` of each held-out text, where it is surest
    first: the source's `nats` per token of it, with its `standard_error` over the texts, and those of each text
    (`by_text`); the share of runs of RUN_LENGTH tokens that are new in their text (`new_runs`); and `seconds`.

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
        "by_text": [round(value, 4) for value in values.tolist()],
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


def nats(bench: Workbench, model: PreTrainedModel) -> float:
    """Nats per token of held-out text, from one draw that is the same for every run."""
    options = {"estimator": "stratified", "num_draws": 1, "batch_size": bench.args.batch_size}
    with fast_bf16(bench.args.device):
        return evaluate_likelihood(model, bench.text["held_out"]["input_ids"], **options, progress=False).nelbo


def fast_bf16(device: str) -> contextlib.AbstractContextManager:
    """Autocast, as in training, where the device is faster for it."""
    return torch.autocast(device, torch.bfloat16) if has_fast_bf16(device) else contextlib.nullcontext()


def below(base: BySeed, arm: BySeed) -> str:
    """
    By how much the texts of `arm` are below those of `base`, written after the same beginnings with the same seeds:
    the mean over seeds with its standard error, and that over texts.
    """
    pairs = [(base[seed], result) for seed, result in arm.items() if seed in base]
    difference = mean([before["nats"] - after["nats"] for before, after in pairs])
    by_seed = [[a - b for a, b in zip(one["by_text"], other["by_text"], strict=True)] for one, other in pairs]
    by_text = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
    return f"{difference} nats per token (over texts ± {standard_error(by_text):.3f})"
