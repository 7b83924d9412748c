"""
Clipped intervals: variance against perplexity, and what the search chooses: `python -m benchmarks.paper.intervals`.

A model is trained under each interval. The variances of all of them are measured on one and the same model of each
block size, the one that was trained with the search, and on the same batches.
"""

from collections.abc import Collection, Sequence
from functools import partial

from bd3lm_hf.modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL

from .experiment import cell, interval_name, is_positive, over_seeds, paired, parts_of, perplexity, run, table
from .noise import variances
from .plots import save_figure
from .scales import Scale
from .workbench import Arm, Workbench


TITLE = "Clipped intervals: variance against perplexity"
INTERVALS = (FULL_NOISE_INTERVAL, (0.3, 0.8), (0.5, 1.0))


def arms(scale: Scale) -> dict[str, Arm]:
    """Those whose interval is searched for, one of each block size."""
    return {"4": Arm(4, search=True), "16": Arm(16, search=True)}


def fixed_arms(searched: Arm) -> list[Arm]:
    """Those of the same block size whose interval stays as it is."""
    return [Arm(searched.block_size, noise_interval=interval) for interval in INTERVALS]


def variances_of(bench: Workbench, searched: Arm, seeds: Sequence[int]) -> list[dict]:
    """Of each seed the variances under all intervals, on the model whose interval was searched for."""

    def measure_one(model, seed: int) -> dict:
        return variances(bench, model, fixed_arms(searched), seed)

    return [bench.measured(searched, seed, "intervals", partial(measure_one, seed=seed)) for seed in seeds]


def search(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> None:
    """The models whose interval is searched for, and the variances."""
    for searched in parts_of(arms(bench.scale), parts).values():
        variances_of(bench, searched, seeds)
        for seed in seeds:
            bench.record(searched, seed)


def fixed(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> None:
    """The models whose interval stays as it is."""
    for searched in parts_of(arms(bench.scale), parts).values():
        for arm in fixed_arms(searched):
            for seed in seeds:
                bench.record(arm, seed)


def measure(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> dict:
    results = {}
    for name, searched in parts_of(arms(bench.scale), parts).items():
        fixed, varied = fixed_arms(searched), variances_of(bench, searched, seeds)
        full = over_seeds(bench.record(fixed[0], seed)["average"]["nelbo"] for seed in seeds)
        of_interval = {}
        for arm in fixed:
            nelbo = over_seeds(bench.record(arm, seed)["average"]["nelbo"] for seed in seeds)
            of_interval[interval_name(arm.noise_interval)] = {
                "nelbo": nelbo,
                "more_than_full": paired(nelbo, full),
                "nelbo_variance": over_seeds(found[arm.name]["nelbo"] for found in varied),
                "gradient_variance": over_seeds(found[arm.name]["gradient"] for found in varied),
            }
        nelbo = over_seeds(bench.record(searched, seed)["average"]["nelbo"] for seed in seeds)
        results[name] = {
            "intervals": of_interval,
            "search": {
                "nelbo": nelbo,
                "more_than_full": paired(nelbo, full),
                "chosen": [[interval_name(each) for each in bench.record(searched, seed)["chosen"]] for seed in seeds],
            },
        }
    return results


def section(document: dict) -> str:
    parts = []
    for block_size, result in document["results"].items():
        intervals = result["intervals"]
        rows = [
            [
                name,
                cell(each["nelbo_variance"], 2),
                cell(each["gradient_variance"], 3),
                cell(perplexity(each["nelbo"]), 2),
                cell(each["more_than_full"]),
            ]
            for name, each in intervals.items()
        ]
        search = result["search"]
        rows.append(["search", "", "", cell(perplexity(search["nelbo"]), 2), cell(search["more_than_full"])])
        header = ["interval", "NELBO variance", "gradient variance", "perplexity", "nats per token more than the full"]
        last = [chosen[-1] for chosen in search["chosen"] if chosen]
        best = min(intervals, key=lambda name: intervals[name]["nelbo"]["mean"])
        calmest = min(intervals, key=lambda name: intervals[name]["nelbo_variance"]["mean"])
        gain = {
            True: "which is **worse** than the full interval",
            False: "which is better than the full interval, outside the errors, as in the paper",
            None: "which the errors **do not tell** from the full interval",
        }[is_positive(search["more_than_full"])]
        agreement = (
            "the least variance and the least perplexity fall together"
            if best == calmest
            else f"the least variance is that of {calmest}, and the least perplexity that of {best}"
        )
        parts.append(
            f"**Block size {block_size}.**\n\n{table(header, rows)}\n\nAt the end the search had chosen "
            f"{', '.join(last)} (one per seed), {gain}. Among these, {agreement}."
        )
    return (
        "Variances, in (nats per token)², of a block's estimate and of the gradient of a training batch.\n\n"
        + "\n\n".join(parts)
    )


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    results = document["results"]
    figure, panels = plt.subplots(1, len(results), figsize=(4.6 * len(results), 3.6), layout="constrained")
    for panel, (block_size, result) in zip(panels, results.items()):
        for name, each in result["intervals"].items():
            value = perplexity(each["nelbo"])
            panel.errorbar(
                each["nelbo_variance"]["mean"],
                value["mean"],
                value["standard_error"] or 0,
                fmt="o",
                capsize=3,
                label=name,
            )
        panel.set(
            title=f"block size {block_size}", xscale="log", xlabel="variance of a block's NELBO", ylabel="perplexity"
        )
        panel.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    run("intervals", __doc__, measure)
