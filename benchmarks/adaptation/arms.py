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
from .workbench import BLOCK_SIZE, Recipe, Workbench, has_fast_bf16, workbench_parser


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
    parser = workbench_parser(__doc__)
    parser.add_argument("--num_tokens", type=int, default=50_000, help="Tokens of training of each run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args(argv)
    bench = Workbench(args)
    results: dict[str, dict[int, Any]] = {name: {} for name in args.arms}
    for seed in args.seeds:
        for name in args.arms:
            path = bench.folder / f"arm-{name.replace(' ', '-').replace(',', '')}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run_arm(bench, ARMS[name], args.num_tokens, seed)), encoding="utf-8")
            results[name][seed] = json.loads(path.read_text(encoding="utf-8"))
            print(f"{name}, seed {seed}: {results[name][seed]['nats']:.4f}", flush=True)
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
    for name, runs in document["runs"].items():
        nats = mean([run["nats"] for run in runs.values()])
        seconds = statistics.mean(run["seconds_per_step"] for run in runs.values())
        difference = "" if name == "baseline" else mean(differences(document, name))
        lines.append(f"| {name} | {nats} | {difference} | {seconds:.2f} |")
    return "\n".join(lines)


def differences(document: dict[str, Any], name: str) -> list[float]:
    """By how many nats an arm is above the baseline, seed by seed."""
    runs = document["runs"]
    return [run["nats"] - runs["baseline"][seed]["nats"] for seed, run in runs[name].items()]


def mean(values: list[float]) -> str:
    """The mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {standard_error(values):.3f}"


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5
