"""
Noise schedules compared by variance and perplexity at block size 4: `python -m benchmarks.paper.schedules`.

Each on the full interval, beside the loglinear one on clipped intervals. Variances as in
`benchmarks/paper/intervals.py`.
"""

from collections.abc import Sequence

from bd3lm_hf.modeling.diffusion_block_diffusion import NOISE_SCHEDULES

from .experiment import cell, is_positive, over_seeds, paired, perplexity, run, table
from .noise import variances
from .plots import save_figure
from .workbench import Arm, Workbench


TITLE = "Noise schedules"
BLOCK_SIZE = 4
ARMS = {
    **{name: Arm(BLOCK_SIZE, noise_schedule=name) for name in NOISE_SCHEDULES},
    "clipped to (0.3, 0.8]": Arm(BLOCK_SIZE, noise_interval=(0.3, 0.8)),
    "clipped to (0.5, 1]": Arm(BLOCK_SIZE, noise_interval=(0.5, 1.0)),
}


def measure(bench: Workbench, seeds: Sequence[int]) -> dict:
    varied = [
        bench.measured(
            Arm(BLOCK_SIZE, search=True),
            seed,
            "schedules",
            lambda model, seed=seed: variances(bench, model, ARMS.values(), seed),
        )
        for seed in seeds
    ]
    results = {}
    for name, arm in ARMS.items():
        nelbo = over_seeds(bench.record(arm, seed)["average"]["nelbo"] for seed in seeds)
        results[name] = {
            "nelbo": nelbo,
            "more_than_loglinear": paired(nelbo, results["loglinear"]["nelbo"] if results else nelbo),
            "nelbo_variance": over_seeds(found[arm.name]["nelbo"] for found in varied),
            "gradient_variance": over_seeds(found[arm.name]["gradient"] for found in varied),
        }
    return results


def section(document: dict) -> str:
    results = document["results"]
    rows = [
        [
            name,
            cell(each["nelbo_variance"], 2),
            cell(each["gradient_variance"], 3),
            cell(perplexity(each["nelbo"]), 2),
            cell(each["more_than_loglinear"]),
        ]
        for name, each in results.items()
    ]
    header = ["schedule", "NELBO variance", "gradient variance", "perplexity", "nats per token more than loglinear"]
    clipped = [name for name in results if "clipped" in name]
    best = min(clipped, key=lambda name: results[name]["nelbo"]["mean"])
    beaten = [
        name
        for name in results
        if name not in clipped and is_positive(paired(results[name]["nelbo"], results[best]["nelbo"]))
    ]
    others = [name for name in results if name not in clipped and name not in beaten]
    verdict = f"The best clipped schedule ({best}) beats {', '.join(beaten) or 'none'} outside the errors"
    verdict += f", and **does not beat** {', '.join(others)}." if others else ": all five, as in the paper."
    return f"Block size {BLOCK_SIZE}.\n\n{table(header, rows)}\n\n{verdict}"


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, each in document["results"].items():
        value = perplexity(each["nelbo"])
        panel.errorbar(
            each["nelbo_variance"]["mean"], value["mean"], value["standard_error"] or 0, fmt="o", capsize=3, label=name
        )
    panel.set(xscale="log", xlabel="variance of a block's NELBO", ylabel="perplexity")
    panel.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    run("schedules", __doc__, measure)
