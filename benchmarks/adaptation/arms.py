"""
`python -m benchmarks.adaptation arms`: which recipe costs least, several seeds at equal tokens.

Each arm differs from the baseline in one thing. A run writes a file of its own, so that an interrupted comparison goes
on where it was; `arms.json` holds all of them. The table gives means over seeds with standard errors, and differences
from the baseline seed by seed.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from ..common import machine
from .workbench import BLOCK_SIZE, Recipe, Workbench, comparison_parser, has_fast_bf16, mean, runs


TWO_COPIES = {"num_noise_samples": 2, "complementary_masks": True}
ARMS = {
    "baseline": Recipe(),
    "no shift": Recipe(shift_logits=False),
    "block sizes 1, 2, 4": Recipe(block_sizes=(1, 2, BLOCK_SIZE)),
    "complementary copies": Recipe(training=TWO_COPIES),
    "uniform weights": Recipe(training={"loss_weight": "uniform"}),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the table."""
    args = comparison_parser(__doc__, list(ARMS), 50_000).parse_args(argv)
    bench = Workbench(args)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        return run_arm(bench, ARMS[name], args.num_tokens, seed)

    results = runs(bench.folder, "arm", args.arms, args.seeds, run_one)
    document = {
        "machine": machine(args.device, "bfloat16" if has_fast_bf16(args.device) else "float32"),
        "num_tokens": args.num_tokens,
        "source_nats": bench.nats(bench.load_source())["nats"],
        "runs": results,
    }
    (bench.folder / "arms.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(document))
    return 0


def run_arm(bench: Workbench, recipe: Recipe, num_tokens: int, seed: int) -> dict[str, Any]:
    """Nats per token at BLOCK_SIZE after one run, and what its steps took."""
    model, tokenizer = bench.adapted(recipe)
    training = bench.train(model, tokenizer, recipe, num_tokens, seed)
    return {**training, **bench.nats(model, BLOCK_SIZE)}


def table(document: dict[str, Any]) -> str:
    """The arms as Markdown."""
    lines = [
        f"The source has {document['source_nats']:.3f} nats per token.",
        "",
        "| recipe | nats per token | difference from the baseline | seconds per step |",
        "|---|---|---|---|",
    ]
    for name, by_seed in document["runs"].items():
        nats = mean([result["nats"] for result in by_seed.values()])
        seconds = statistics.mean(result["seconds_per_step"] for result in by_seed.values())
        difference = "" if name == "baseline" else mean(differences(document, name))
        lines.append(f"| {name} | {nats} | {difference} | {seconds:.2f} |")
    return "\n".join(lines)


def differences(document: dict[str, Any], name: str) -> list[float]:
    """By how many nats an arm is above the baseline, seed by seed."""
    arms = document["runs"]
    return [result["nats"] - arms["baseline"][seed]["nats"] for seed, result in arms[name].items()]
