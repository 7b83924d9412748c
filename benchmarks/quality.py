"""
Quality against speed for a trained model, and infilling: `python -m benchmarks.quality --output_dir quality`.

`train` trains a small BD3-LM, a GPT-2 of the same size, and another GPT-2 that judges, on the Python standard library
unless `--data` says otherwise; `sampling` draws texts by every sampler and judges them; `speed` times those settings
that take few forwards beside GPT-2's `generate`, which needs the machine for itself; `infilling` scores words that
were removed from held-out text; `report` draws the plot and writes the tables into `--page`. Models are kept in
`--output_dir`, and figures in `--results`, so the parts may be run one by one.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from bd3lm_hf import generative_perplexity
from bd3lm_hf.evaluation.estimate import Estimate
from bd3lm_hf.evaluation.likelihood import evaluate_likelihood
from bd3lm_hf.evaluation.quality import token_entropy

from .common import interleaved_medians, machine
from .infilling import Gap, autoregressive_nll, draw_gap, fill, per_token, score_gap
from .quality_report import insert_tables, plot
from .trained import Recipe, TrainedModels, train_or_load


PARTS = ("train", "sampling", "speed", "infilling", "report")
TOP_P = 0.9
# Settings that take at most so many forwards per token are timed. BOS leaves the first block a token less, so half
# as many steps as a block has tokens are a little more than 0.5.
FEW_FORWARDS = 0.51
GPT2, HELD_OUT, EXACT = "GPT-2", "held-out text", "first_hitting"


def sampler_settings(block_size: int) -> dict[str, dict]:
    """Arguments of `generate` for each setting, by its name."""
    steps = [2**power for power in range(block_size.bit_length())]
    settings = [{"sampler": EXACT}]
    settings += [{"sampler": "ancestral", "denoising_steps": number} for number in steps]
    settings += [{"sampler": "ancestral", "denoising_steps": number, "remask_cap": 0.3} for number in steps[2:]]
    settings += [{"sampler": "confidence", "denoising_steps": number} for number in sorted({*steps, 3})]
    settings += [{"sampler": "confidence", "confidence_threshold": value} for value in (0.1, 0.3, 0.5, 0.9)]
    settings += [{"sampler": "entropy_bound", "entropy_bound": value} for value in (0.5, 2.0, 4.0, 8.0, 16.0)]
    return {name_of(setting): setting for setting in settings}


def name_of(setting: dict) -> str:
    return ", ".join(f"{name}={value}" if name != "sampler" else value for name, value in setting.items())


def draw_samples(model: PreTrainedModel, num_samples: int, length: int, seed: int, **setting):
    """Texts behind BOS, ids [num_samples, length], and the forwards that they took per token."""
    set_seed(seed)
    prompts = torch.full((num_samples, 1), model.config.bos_token_id)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=length - 1,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        return_dict_in_generate=True,
        **setting,
    )
    assert output.sequences.shape == (num_samples, length)
    forwards = getattr(output, "num_forward_passes", None)
    return output.sequences, 1.0 if forwards is None else forwards.double().mean().item() / (length - 1)


def judge_samples(models: TrainedModels, samples: Sequence[Sequence[int]]) -> dict[str, float]:
    """Generative perplexity of texts under the judge, and the mean entropy of their tokens in nats."""
    texts = models.tokenizer.batch_decode(samples, clean_up_tokenization_spaces=False)
    judged = generative_perplexity(texts, models.judge, models.tokenizer, progress=False)
    return {
        "generative_perplexity": judged.perplexity.value,
        "entropy": mean(token_entropy(sample[1:]) for sample in samples),
    }


def over_seeds(figures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The mean of each figure over seeds and its standard error."""
    columns = {name: [figure[name] for figure in figures] for name in figures[0]}
    return {
        name: {"value": mean(values), "standard_error": stdev(values) / math.sqrt(len(values))}
        for name, values in columns.items()
    }


def measure_sampling(
    models: TrainedModels, num_seeds: int, num_samples: int, known: dict, keep: Callable[[dict], None]
) -> None:
    """
    Each setting, GPT-2, and as much held-out text: forwards per token, generative perplexity and entropy.

    Args:
        known: the figures of an interrupted run, whose rows are not measured again.
        keep: called with all figures after each row.
    """
    length = models.bd3lm.config.max_position_embeddings
    how = {"top_p": TOP_P, "num_seeds": num_seeds, "num_samples": num_samples, "length": length}
    rows = dict(known.get("rows", {})) if all(known.get(name) == value for name, value in how.items()) else {}
    sources = {GPT2: (models.gpt2, {})}
    sources |= {
        name: (models.bd3lm, setting) for name, setting in sampler_settings(models.bd3lm.config.block_size).items()
    }
    if HELD_OUT not in rows:
        texts = [models.held_out[seed * num_samples :][:num_samples] for seed in range(num_seeds)]
        rows[HELD_OUT] = over_seeds([judge_samples(models, part) for part in texts])
    for name in [name for name in sources if name not in rows]:
        model, setting = sources[name]
        figures = []
        for seed in range(num_seeds):
            samples, forwards = draw_samples(model, num_samples, length, seed, **setting)
            figures.append({"forwards_per_token": forwards, **judge_samples(models, samples.tolist())})
        rows[name] = {"arguments": setting, **over_seeds(figures)}
        keep({**how, "rows": {key: rows[key] for key in (HELD_OUT, *sources) if key in rows}})
        print(f"{name}: {rows[name]}", flush=True)


def measure_speed(models: TrainedModels, sampling: dict, repeats: int, num_texts: int = 4) -> dict:
    """Tokens/s of GPT-2, of `first_hitting`, of settings with few forwards per token, and of batches of 8."""
    length = models.bd3lm.config.max_position_embeddings
    few = [
        name
        for name, row in sampling["rows"].items()
        if row.get("arguments", {}).get("sampler") in ("confidence", "entropy_bound")
        and row["forwards_per_token"]["value"] <= FEW_FORWARDS
    ]

    def make_run(name: str, batch_size: int, num_batches: int) -> Callable[[], None]:
        model = models.gpt2 if name == GPT2 else models.bd3lm

        def run() -> None:
            # The same texts in each round: how many forwards one takes depends on what it says.
            for seed in range(num_batches):
                draw_samples(model, batch_size, length, seed, **sampling["rows"][name]["arguments"])

        return run

    def tokens_per_second(batch_size: int, num_batches: int) -> dict[str, float]:
        runs = {name: make_run(name, batch_size, num_batches) for name in (GPT2, EXACT, *few)}
        seconds = interleaved_medians(runs, repeats)
        return {name: batch_size * num_batches * (length - 1) / value for name, value in seconds.items()}

    alone, in_batch = tokens_per_second(1, num_texts), tokens_per_second(8, 1)
    rows = {name: {"batch_1": alone[name], "batch_8": in_batch[name]} for name in alone}
    return {"machine": machine(), "repeats": repeats, "num_texts": num_texts, "tokens_per_second": rows}


def measure_infilling(models: TrainedModels, seed: int = 0, batch_size: int = 64) -> dict:
    """Nats per removed token of one gap in each held-out text, and how many tokens `generate` brings back."""
    generator = np.random.default_rng(seed)
    drawn = [(ids, draw_gap(ids, models.tokenizer, generator)) for ids in models.held_out]
    drawn = [(ids, gap) for ids, gap in drawn if gap is not None]
    sequences, gaps = torch.tensor([ids for ids, _ in drawn]), [gap for _, gap in drawn]
    scores = [
        {**score_gap(models.bd3lm, ids, gap), "gpt2": autoregressive_nll(models.gpt2, ids, gap)}
        for ids, gap in zip(sequences, gaps, strict=True)
    ]
    for name, sees_right in (("restored_by_infill", True), ("restored_by_continue", False)):
        for start in range(0, len(gaps), batch_size):
            rows = slice(start, start + batch_size)
            restored = fill(models.bd3lm, sequences[rows], gaps[rows], sees_right)
            for score, number in zip(scores[rows], restored, strict=True):
                score[name] = float(number)
    block_size = models.bd3lm.config.block_size
    groups = {
        "all": lambda gap: True,
        "text behind it in its last block": lambda gap: gap.stop % block_size != 0,
        "1 or 2 tokens": lambda gap: gap.num_tokens <= 2,
        "3 to 5 tokens": lambda gap: 3 <= gap.num_tokens <= 5,
        "6 to 8 tokens": lambda gap: gap.num_tokens >= 6,
        "through several blocks": lambda gap: len(gap.in_blocks(block_size)) > 1,
    }
    return {"seed": seed, "rows": {name: _of_group(scores, gaps, group) for name, group in groups.items()}}


def _of_group(scores: list[dict[str, float]], gaps: list[Gap], belongs: Callable[[Gap], bool]) -> dict:
    """Figures per removed token over the gaps of a group; differences are paired."""
    chosen = [index for index, gap in enumerate(gaps) if belongs(gap)]
    num_tokens = [gaps[index].num_tokens for index in chosen]
    row = {"num_gaps": len(chosen), "num_tokens": sum(num_tokens)}
    if len(chosen) < 2:
        return row
    estimates = {name: per_token([scores[index][name] for index in chosen], num_tokens) for name in scores[0]}
    for name in ("continue", "continue_left_to_right", "gpt2"):
        estimates[f"{name}_less_infill"] = estimates[name] - estimates["infill"]
    estimates["continue_bound_less_infill_bound"] = estimates["continue_bound"] - estimates["infill_bound"]
    return row | {name: to_json(estimate) for name, estimate in estimates.items()}


def to_json(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "standard_error": estimate.standard_error}


def measure_likelihood(models: TrainedModels, num_sequences: int = 128) -> dict[str, dict]:
    """Held-out nats per token of each model: an upper bound for the BD3-LM."""
    figures = {
        name: evaluate_likelihood(getattr(models, name), models.held_out[:num_sequences], progress=False)
        for name in ("bd3lm", "gpt2", "judge")
    }
    return {name: {"value": figure.nelbo, "standard_error": figure.standard_error} for name, figure in figures.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--output_dir", type=Path, required=True, help="the models, and by default all else")
    parser.add_argument("--results", type=Path, help="JSON (default: quality.json in --output_dir)")
    parser.add_argument("--plot", type=Path, help="(default: sampler_quality.png in --output_dir)")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced; by default none is")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="of training (default: %(default)s)")
    parser.add_argument("--num_held_out", type=int, default=512, help="held-out sequences, of which each has a gap")
    parser.add_argument("--num_seeds", type=int, default=4)
    parser.add_argument("--num_samples", type=int, default=48, help="texts for each seed")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted `sampling`")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    arguments = parser.parse_args(argv)
    parts = arguments.parts or PARTS
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"PART must be any of {', '.join(PARTS)}, but got {', '.join(unknown)}")
    results_path = arguments.results or arguments.output_dir / "quality.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}

    def keep(part: str, figures: dict) -> None:
        results[part] = figures
        results_path.parent.mkdir(parents=True, exist_ok=True)
        results_path.write_text(json.dumps(results, indent=2) + "\n")

    if set(parts) != {"report"}:
        recipe = replace(Recipe(), **{name: getattr(arguments, name) for name in asdict(Recipe())})
        models = train_or_load(recipe, arguments.output_dir, arguments.num_held_out)
    if "train" in parts:
        num_parameters = {name: getattr(models, name).num_parameters() for name in ("bd3lm", "gpt2", "judge")}
        keep("recipe", {**asdict(recipe), "num_parameters": num_parameters})
        keep("likelihood", measure_likelihood(models))
    if "sampling" in parts:
        known = results.get("sampling", {}) if arguments.resume else {}
        measure_sampling(models, arguments.num_seeds, arguments.num_samples, known, partial(keep, "sampling"))
    if "speed" in parts:
        keep("speed", measure_speed(models, results["sampling"], arguments.repeats))
    if "infilling" in parts:
        keep("infilling", measure_infilling(models))
    if "report" in parts:
        plot(results, arguments.plot or arguments.output_dir / "sampler_quality.png")
        insert_tables(results, arguments.page)


if __name__ == "__main__":
    main()
