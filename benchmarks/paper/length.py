"""
Far past the training length: `python -m benchmarks.paper.length`.

Models trained at length L read and write 8 L tokens, in three ways:

* windows: each window of L tokens is read anew, half a window behind the one before;
* sliding: one pass in which each layer sees the last L tokens, which is what `generate` does past the context;
* widened: one pass in which every token sees all before it, as if the context were 8 L.

Block size = length is left out: no block sees another there, so its length is its context.
"""

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch

from bd3lm_hf import BD3LMDataCollator, evaluate_likelihood
from bd3lm_hf.evaluation.estimators import BlockDiffusionScorer, DrawnNoise, ExactNoise
from bd3lm_hf.evaluation.quality import sample_statistics

from .experiment import cell, is_positive, over_seeds, paired, parts_of, perplexity, run, table
from .plots import save_figure
from .scales import Scale
from .workbench import AUTOREGRESSIVE, TUNED_BLOCK_SIZE_ONE, Arm, Workbench


TITLE = "Past the training length"
TIMES = 8
WAYS = ("windows", "sliding", "widened")
# Positions from a times the training length to b times.
RANGES = ((0, 1), (1, 2), (2, 4), (4, 8))
RANGE_NAMES = [f"{a}-{b} L" for a, b in RANGES]


def arms(scale: Scale) -> dict[str, Arm]:
    return {"1": TUNED_BLOCK_SIZE_ONE, "4": Arm(4, search=True), "16": Arm(16, search=True)}


def of_ranges(per_position: Sequence[float | None], length: int) -> list[float]:
    """The mean over each of `RANGES`, without BOS, which is not predicted."""
    values = np.array([np.nan if value is None else value for value in per_position], dtype=float)
    return [float(np.nanmean(values[a * length : b * length])) for a, b in RANGES]


@torch.no_grad()
def nelbo_in_one_pass(bench: Workbench, model) -> np.ndarray:
    """Nats of the token at each position of the long sequences, read at once, on average."""
    config, rows = model.config, bench.long_sequences
    noise = ExactNoise(config, 1) if config.block_size == 1 else DrawnNoise(config, "stratified", seed=0)
    scorer, collate = BlockDiffusionScorer(model, noise), BD3LMDataCollator(config.pad_token_id)
    total = np.zeros(len(rows[0]))
    for start in range(0, len(rows), 8):
        numbers = range(start, min(start + 8, len(rows)))
        batch = collate([{"input_ids": rows[number], "labels": rows[number]} for number in numbers])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for part in scorer.parts(batch, numbers, 0):
            total += part.double().sum(0).cpu().numpy()
    total[0] = np.nan
    return total / len(rows)


def likelihood(bench: Workbench, model) -> dict:
    length = bench.scale.length
    estimator = "exact" if model.config.block_size == 1 else "stratified"
    windows = evaluate_likelihood(
        model, bench.long_sequences, estimator=estimator, num_draws=1, batch_size=32, progress=False
    )
    positions = {"windows": windows.nelbo_per_position, "sliding": nelbo_in_one_pass(bench, model)}
    model.config.max_position_embeddings = TIMES * length
    positions["widened"] = nelbo_in_one_pass(bench, model)
    return {way: of_ranges(values, length) for way, values in positions.items()}


def long_samples(bench: Workbench, model, seed: int) -> dict:
    """Samples of 8 L tokens, EOS being a token like any other, by ranges of positions."""
    tokenizer, length = bench.tokenizer, bench.scale.length
    prompts = torch.full((bench.scale.num_samples, 1), tokenizer.bos_token_id, device=bench.device)
    found = {}
    for way in WAYS[1:]:
        model.config.max_position_embeddings = length * (TIMES if way == "widened" else 1)
        samples = model.generate(prompts, max_new_tokens=TIMES * length - 1, seed=1_000_000 * seed).tolist()
        found[way] = quality(bench, samples, seed)
    return found


def quality(bench: Workbench, samples: Sequence[Sequence[int]], seed: int) -> dict:
    """Per range: nats under the judge, and the entropy and share of repeated 4-grams of pieces of length L."""
    length = bench.scale.length
    judge = bench.trained(AUTOREGRESSIVE, seed)
    nats = evaluate_likelihood(judge, samples, batch_size=32, progress=False).nelbo_per_position
    found = {"nll": of_ranges(nats, length), "entropy": [], "repetition": []}
    for first, last in RANGES:
        starts = range(first * length, last * length, length)
        statistics = sample_statistics([ids[start : start + length] for ids in samples for start in starts])
        found["entropy"].append(statistics.entropy.value)
        found["repetition"].append(statistics.repetition[4].value)
    return found


def lengths(bench: Workbench, model, seed: int) -> dict:
    """How long the documents are that a model writes until EOS, within 8 L tokens."""
    tokenizer, limit = bench.tokenizer, TIMES * bench.scale.length
    # In training a document begins behind the EOS of the one before.
    prompt = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    prompts = torch.tensor([prompt] * (4 * bench.scale.num_samples), device=bench.device)
    samples = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=limit,
        seed=1_000_000 * seed + 500_000,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _lengths(bench, samples[:, len(prompt) :].tolist())


def text_lengths(bench: Workbench) -> dict:
    documents = bench.tokenizer(bench.documents["held_out"], add_special_tokens=False)["input_ids"]
    limit, eos = TIMES * bench.scale.length, bench.tokenizer.eos_token_id
    return _lengths(bench, [(ids + [eos])[:limit] for ids in documents])


def _lengths(bench: Workbench, samples: Sequence[Sequence[int]]) -> dict:
    tokenizer = bench.tokenizer
    found = sample_statistics(samples, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return {
        "mean": found.length.value,
        "quantiles": found.length_quantiles,
        "ended_by_eos": found.ended_by_eos.value,
    }


def measurements(bench: Workbench, arm: Arm, seeds: Sequence[int], *names: str) -> list[list[dict]]:
    """Of an arm, for each of some names what was measured of each seed."""
    known = {
        "long_likelihood": lambda model, seed: likelihood(bench, model),
        "long_samples": lambda model, seed: long_samples(bench, model, seed),
        "lengths": lambda model, seed: lengths(bench, model, seed),
    }
    return [[bench.measured(arm, seed, name, partial(known[name], seed=seed)) for seed in seeds] for name in names]


def texts(bench: Workbench, seeds: Sequence[int]) -> tuple[list[dict], dict]:
    """What is known of the held-out text: of each seed by its judge, and how long its documents are."""
    judged = [
        bench.measured(
            AUTOREGRESSIVE, seed, "long_text", lambda _, seed=seed: quality(bench, bench.long_sequences, seed)
        )
        for seed in seeds
    ]
    return judged, bench.measured(AUTOREGRESSIVE, seeds[0], "text_lengths", lambda _: text_lengths(bench))


def read(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> None:
    """What needs no judge: likelihoods, and when samples end."""
    for arm in parts_of(arms(bench.scale), parts).values():
        measurements(bench, arm, seeds, "long_likelihood", "lengths")


def write(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> None:
    """What a judge reads."""
    for arm in parts_of(arms(bench.scale), parts).values():
        measurements(bench, arm, seeds, "long_samples")
    texts(bench, seeds)


def measure(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> dict:
    likelihoods, samples, ends = {}, {}, {}
    for size, arm in parts_of(arms(bench.scale), parts).items():
        read, written, ended = measurements(bench, arm, seeds, "long_likelihood", "long_samples", "lengths")
        likelihoods[size] = {way: _by_range([each[way] for each in read]) for way in WAYS}
        samples[size] = {
            way: {figure: _by_range([each[way][figure] for each in written]) for figure in written[0][way]}
            for way in WAYS[1:]
        }
        ends[size] = {
            "mean": over_seeds(each["mean"] for each in ended),
            "ended_by_eos": over_seeds(each["ended_by_eos"] for each in ended),
            "quartiles": [over_seeds(each["quantiles"][number] for each in ended) for number in (1, 2, 3)],
        }
    text, own_lengths = texts(bench, seeds)
    return {
        "likelihood": likelihoods,
        "samples": samples,
        "text": {figure: _by_range([each[figure] for each in text]) for figure in ("nll", "entropy", "repetition")},
        "lengths": ends,
        "text_lengths": own_lengths,
    }


def _by_range(values: Sequence[Sequence[float]]) -> dict:
    return {name: over_seeds(each) for name, each in zip(RANGE_NAMES, zip(*values, strict=True), strict=True)}


def section(document: dict) -> str:
    results, settings = document["results"], document["settings"]
    rows = [
        [size, way, *(cell(perplexity(each), 2) for each in ranges.values())]
        for size, ways in results["likelihood"].items()
        for way, ranges in ways.items()
    ]
    context = f"L is {settings['length']} tokens."
    text = f"""{context} In windows, each of L tokens is read anew. In a sliding pass each layer
sees L tokens back, so that deeper ones hear of earlier tokens; that is what `generate` does. Widened, every token
sees all before it.

Perplexity of held-out text at positions up to 8 L:

{table(["block size", "way", *RANGE_NAMES], rows)}

Some ranges hold harder text than others, so a pass is judged beside windows at the same positions.
{_verdict(_beside_windows(results["likelihood"]), "Likelihood")}"""

    rows = [
        [size, way, *(cell(perplexity(each), 1) for each in figures["nll"].values())]
        for size, ways in results["samples"].items()
        for way, figures in ways.items()
    ]
    rows.append(["", "held-out text", *(cell(perplexity(each), 1) for each in results["text"]["nll"].values())])
    nll = {size: {way: each["nll"] for way, each in ways.items()} for size, ways in results["samples"].items()}
    text += f"""

Samples of 8 L tokens, {settings["num_samples"]} for each row and seed. Their perplexity under the autoregressive
judge, which reads windows of L:

{table(["block size", "way", *RANGE_NAMES], rows)}

{_verdict(nll, "Quality")}

Entropy in nats, and the share of 4-grams that repeat earlier ones, within pieces of L tokens:
"""
    rows = [
        [size, way, *(f"{cell(each, 2)}; {100 * share['mean']:.1f}%" for each, share in _pairs(figures))]
        for size, ways in results["samples"].items()
        for way, figures in ways.items()
    ]
    rows.append(
        [
            "",
            "held-out text",
            *(f"{cell(each, 2)}; {100 * share['mean']:.1f}%" for each, share in _pairs(results["text"])),
        ]
    )
    text += f"\n{table(['block size', 'way', *RANGE_NAMES], rows)}\n"

    rows = [
        [
            size,
            cell(each["mean"], 0),
            *(cell(quartile, 0) for quartile in each["quartiles"]),
            f"{100 * (1 - each['ended_by_eos']['mean']):.1f}%",
        ]
        for size, each in results["lengths"].items()
    ]
    held_out = results["text_lengths"]
    quartiles = [f"{value:.0f}" for value in held_out["quantiles"][1:4]]
    rows.append(
        ["held-out text", f"{held_out['mean']:.0f}", *quartiles, f"{100 * (1 - held_out['ended_by_eos']):.1f}%"]
    )
    header = ["block size", "mean length", "first quartile", "median", "third quartile", f"longer than {TIMES} L"]
    return f"{text}\nTokens of a document until EOS, cut at {TIMES} L:\n\n{table(header, rows)}"


def _pairs(figures: dict):
    return zip(figures["entropy"].values(), figures["repetition"].values(), strict=True)


def _beside_windows(by_size: dict) -> dict:
    """What the passes cost more than windows of the same text."""
    return {
        size: {way: {name: paired(ways[way][name], ways["windows"][name]) for name in RANGE_NAMES} for way in WAYS[1:]}
        for size, ways in by_size.items()
    }


def _verdict(by_size: dict, subject: str) -> str:
    """Where 4-8 L differ from 1-2 L, both of which are past the training length."""
    worse, same = [], []
    for size, ways in by_size.items():
        for way, ranges in ways.items():
            change = paired(ranges["4-8 L"], ranges["1-2 L"])
            known = is_positive(change) and change["mean"] > 0
            (worse if known else same).append(f"{size} {way} ({change['mean']:+.3f})")
    parts = []
    if same:
        parts.append(
            f"{subject} stays, or gets no worse outside the errors, from 1-2 L to 4-8 L (block size, way, and the "
            f"change in nats per token): {', '.join(same)}."
        )
    if worse:
        parts.append(f"It **gets worse**: {', '.join(worse)}.")
    return " ".join(parts)


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    results = document["results"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for number, size in enumerate(results["likelihood"]):
        for way, style in zip(WAYS, (":", "-", "--")):
            for panel, found in ((panels[0], results["likelihood"][size]), (panels[1], results["samples"][size])):
                if way not in found:
                    continue
                ranges = found[way] if panel is panels[0] else found[way]["nll"]
                values = [perplexity(each) for each in ranges.values()]
                panel.errorbar(
                    list(ranges),
                    [value["mean"] for value in values],
                    [value["standard_error"] or 0 for value in values],
                    color=f"C{number}",
                    linestyle=style,
                    capsize=2,
                    label=f"block size {size}, {way}",
                )
    held_out = [perplexity(each)["mean"] for each in results["text"]["nll"].values()]
    panels[1].plot(RANGE_NAMES, held_out, color="grey", label="held-out text")
    panels[0].set(title="held-out text", xlabel="positions", ylabel="perplexity (bound)", yscale="log")
    panels[1].set(title="samples", xlabel="positions", ylabel="perplexity under the judge", yscale="log")
    for panel in panels:
        panel.legend(fontsize="x-small")
    save_figure(figure, path)


if __name__ == "__main__":
    run("length", __doc__, measure)
