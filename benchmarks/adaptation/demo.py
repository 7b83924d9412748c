"""
`make adapt-demo`: SmolLM2-135M-Instruct from autoregressive to block size 4.

Converts the model, scores it at block sizes 1, 2, 4 and 8, trains it, scores it again, and lets it write beside the
source at one, two and four tokens per forward; `report.md` and `report.png` in the output folder show all of it.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bd3lm_hf import BlockDiffusionForMaskedLM

from ..common import machine
from .workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, has_fast_bf16, workbench_parser


SCORED_SIZES = (1, 2, 4, 8)
TOKENS_PER_FORWARD = (1, 2, 4)
NUM_NEW_TOKENS = 48
NUM_ROUNDS = 3
NUM_TOKENS = {"cpu": 240_000, "cuda": 8_000_000}
# The one that costs least (docs/results.md).
RECIPE = Recipe()
# Block size 1 is the autoregressive model; it has to score as the source does.
MAX_DIFFERENCE = 1e-4


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; 1 if the converted model is not the source."""
    parser = workbench_parser(__doc__)
    parser.add_argument("--num_tokens", type=int, help=f"Tokens of training. (default: {NUM_TOKENS})")
    args = parser.parse_args(argv)
    bench = Workbench(args)
    num_tokens = args.num_tokens or NUM_TOKENS["cpu" if args.device == "cpu" else "cuda"]

    source = bench.load_source()
    results: dict[str, Any] = {
        "machine": machine(args.device, "bfloat16" if has_fast_bf16(args.device) else "float32"),
        "source": bench.nats(source),
    }
    print(f"source: {results['source']['nats']:.4f} nats per token", flush=True)
    del source

    model, tokenizer = bench.adapted(RECIPE)
    results["before"] = scores(bench, model, "before training")
    difference = abs(results["before"]["1"]["nats"] - results["source"]["nats"])
    results["training"] = bench.train(model, tokenizer, RECIPE, num_tokens, seed=0)
    model.config.block_size = BLOCK_SIZE
    for part in (model, tokenizer):
        part.save_pretrained(bench.folder / "model")
    # What was saved is scored, in float32 as before; accelerate leaves bfloat16 autocast around what it has trained.
    model = BlockDiffusionForMaskedLM.from_pretrained(bench.folder / "model", dtype=torch.float32)
    model = model.to(args.device).eval()
    results["after"] = scores(bench, model, "after training")
    results |= written(bench, model)
    (bench.folder / "report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (bench.folder / "report.md").write_text(report(results), encoding="utf-8")
    plot(results, bench.folder / "report.png")
    print((bench.folder / "report.md").read_text(encoding="utf-8"))
    if difference > MAX_DIFFERENCE:
        print(f"at block size 1 the model must score as the source, but the scores differ by {difference:.1e} nats")
        return 1
    return 0


def scores(bench: Workbench, model, when: str) -> dict[str, Any]:
    """Nats per token of the held-out text at each block size."""
    results = {}
    for size in SCORED_SIZES:
        results[str(size)] = bench.nats(model, size)
        print(f"{when}, block size {size}: {results[str(size)]['nats']:.4f} nats per token", flush=True)
    return results


def written(bench: Workbench, model) -> dict[str, Any]:
    """
    What the source and the model write, with tokens per second: medians of rounds in which one writes after the other.
    """
    source = bench.load_source()
    ways = {None: source} | dict.fromkeys(TOKENS_PER_FORWARD, model)
    texts: dict[int | None, str] = {}
    speeds: dict[int | None, list[float]] = {count: [] for count in ways}
    # The first round warms up.
    for round_number in range(1 + NUM_ROUNDS):
        for count, writer in ways.items():
            texts[count], speed = write(writer, bench, count)
            speeds[count] += [speed] if round_number else []
    results = {count: {"text": texts[count], "tokens_per_second": statistics.median(speeds[count])} for count in ways}
    return {"source_text": results.pop(None), "texts": {str(count): text for count, text in results.items()}}


def write(model, bench: Workbench, tokens_per_forward: int | None) -> tuple[str, float]:
    """A continuation of the first held-out text, and tokens per second; None is the source's own `generate`."""
    prompt = torch.tensor([bench.text["held_out"][0]["input_ids"][: LENGTH // 2]], device=model.device)
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    if tokens_per_forward is not None:
        options |= {"sampler": "confidence", "denoising_steps": BLOCK_SIZE // tokens_per_forward}
    start = time.perf_counter()
    output = model.generate(prompt, **options)
    seconds = time.perf_counter() - start
    return bench.tokenizer.decode(output[0, prompt.shape[1] :]), NUM_NEW_TOKENS / seconds


def report(results: dict[str, Any]) -> str:
    """The figures and texts as a page."""
    return "# SmolLM2-135M-Instruct as a block diffusion model\n\n" + section(results) + "\n"


def section(results: dict[str, Any]) -> str:
    """[`report`] without its title."""
    training = results["training"]
    lines = [
        f"Trained on {training['tokens']:,} tokens in {training['steps']} steps of "
        f"{training['seconds_per_step']:.2f} s ({results['machine']}). Nats per token of held-out text; the source "
        f"has {results['source']['nats']:.3f} ± {results['source']['standard_error']:.3f}.",
        "",
        "| block size | before training | after |",
        "|---|---|---|",
    ]
    for size in results["before"]:
        cells = (f"{results[when][size]['nats']:.3f} ± {results[when][size]['standard_error']:.3f}" for when in WHEN)
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines += ["", "| writes | tokens per second |", "|---|---|"]
    texts = {"the source": results["source_text"]}
    texts |= {f"{count} tokens per forward": text for count, text in results["texts"].items()}
    lines += [f"| {name} | {text['tokens_per_second']:.1f} |" for name, text in texts.items()]
    for name, text in texts.items():
        lines += ["", f"{name}:", "", *(f"    {line}" for line in text["text"].splitlines())]
    return "\n".join(lines)


WHEN = ("before", "after")


def plot(results: dict[str, Any], path: Path) -> None:
    """The same scores as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = list(results["before"])
    for when in WHEN:
        nats = [results[when][size]["nats"] for size in sizes]
        errors = [results[when][size]["standard_error"] for size in sizes]
        axes.errorbar(sizes, nats, errors, marker="o", capsize=3, label=f"{when} training")
    axes.axhline(results["source"]["nats"], color="black", linestyle="--", label="the source, autoregressive")
    axes.set(xlabel="block size", ylabel="nats per token of held-out text", title="SmolLM2-135M-Instruct, adapted")
    axes.legend()
    figure.savefig(path, dpi=120)
