"""
`make adapt-demo`: SmolLM2-135M-Instruct from autoregressive to block size 4.

Converts the model, scores it at block sizes 1, 2, 4 and 8, trains it, scores it again, and lets it write beside the
source at one, two and four tokens per forward; `report.md` and `report.png` in the output folder show all of it.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import machine
from .workbench import BLOCK_SIZE, LENGTH, Recipe, Workbench, has_fast_bf16, workbench_parser


SCORED_SIZES = (1, 2, 4, 8)
TOKENS_PER_FORWARD = (1, 2, 4)
NUM_NEW_TOKENS = 48
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
    results["source_text"] = write(source, bench, None)
    del source

    model, tokenizer = bench.adapted(RECIPE)
    results["before"] = scores(bench, model, "before training")
    difference = abs(results["before"]["1"]["nats"] - results["source"]["nats"])
    results["training"] = bench.train(model, tokenizer, RECIPE, num_tokens, seed=0)
    model.config.block_size = BLOCK_SIZE
    results["after"] = scores(bench, model, "after training")
    results["texts"] = {str(count): write(model, bench, count) for count in TOKENS_PER_FORWARD}
    for part in (model, tokenizer):
        part.save_pretrained(bench.folder / "model")
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


def write(model, bench: Workbench, tokens_per_forward: int | None) -> dict[str, Any]:
    """A continuation of the first held-out text, and tokens per second; None is the source's own `generate`."""
    prompt = torch.tensor([bench.text["held_out"][0]["input_ids"][: LENGTH // 2]], device=model.device)
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    if tokens_per_forward is not None:
        options |= {"sampler": "confidence", "denoising_steps": BLOCK_SIZE // tokens_per_forward}
    # The first call warms up.
    model.generate(prompt, **{**options, "max_new_tokens": 4, "min_new_tokens": 4})
    start = time.perf_counter()
    output = model.generate(prompt, **options)
    seconds = time.perf_counter() - start
    text = bench.tokenizer.decode(output[0, prompt.shape[1] :])
    return {"text": text, "tokens_per_second": NUM_NEW_TOKENS / seconds}


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
