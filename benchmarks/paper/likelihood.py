"""
Likelihood by block size, beside an autoregressive model: `python -m benchmarks.paper.likelihood`.

Block size 1 is trained at t = 1, where the objective is the exact likelihood; block sizes between 1 and the length
under the interval that the search chooses; block size = length, masked diffusion, under the full interval.
"""

from collections.abc import Collection, Sequence

from .experiment import cell, is_positive, over_seeds, paired, parts_of, perplexity, run, table
from .plots import save_figure
from .scales import Scale
from .workbench import AUTOREGRESSIVE, TUNED_BLOCK_SIZE_ONE, Arm, Workbench


TITLE = "Likelihood by block size"
# Perplexities of arXiv 2503.09573 on LM1B and OpenWebText; at block size = length, those of MDLM.
PAPER = {
    "autoregressive": ("22.88", "17.54"),
    "4": ("28.23", "20.73"),
    "8": ("29.83", "21.68"),
    "16": ("30.60", "22.27"),
    "length": ("31.78", "22.98"),
}


def arms(scale: Scale) -> dict[str, Arm]:
    """From the least to the most perplexity, as the paper has it."""
    sizes = [size for size in scale.block_sizes if size < scale.length]
    return {
        "autoregressive": AUTOREGRESSIVE,
        "1": TUNED_BLOCK_SIZE_ONE,
        **{str(size): Arm(size, search=True) for size in sizes},
        "length": Arm(scale.length),
    }


def measure(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> dict:
    results = {}
    for name, arm in parts_of(arms(bench.scale), parts).items():
        records = [bench.record(arm, seed) for seed in seeds]
        results[name] = {
            "nelbo": over_seeds(record["average"]["nelbo"] for record in records),
            "error_over_sequences": max(record["average"]["standard_error"] for record in records),
            "error_over_draws": max(record["average"]["draw_standard_error"] or 0 for record in records),
            "num_parameters": records[0]["num_parameters"],
            "chosen": [record["chosen"][-1] for record in records if record["chosen"]],
        }
    names = list(results)
    for before, name in zip(names, names[1:]):
        results[name]["more_than_before"] = paired(results[name]["nelbo"], results[before]["nelbo"])
    return results


def section(document: dict) -> str:
    results, length = document["results"], document["settings"]["length"]
    rows = []
    for name, result in results.items():
        difference = result.get("more_than_before")
        rows.append(
            [
                f"{name} ({length})"
                if name == "length"
                else "autoregressive (GPT-2)"
                if name.startswith("a")
                else name,
                cell(perplexity(result["nelbo"]), 2),
                cell(result["nelbo"]),
                cell(difference) if difference else "",
                *PAPER.get(name, ("", "")),
            ]
        )
    header = ["block size", "perplexity", "nats per token", "more than the row above", "paper: LM1B", "OpenWebText"]
    sizes = [name for name in results if name not in ("autoregressive", "1")]
    told = {name: is_positive(results[name]["more_than_before"]) for name in sizes}
    wrong = [name for name in sizes if not told[name]]
    order = "The ordering of the paper holds outside the errors at each step from block size 1 up."
    if wrong:
        order = (
            "The ordering of the paper **does not hold** outside the errors at the step"
            f"{'s' if len(wrong) > 1 else ''} to block size {', '.join(wrong)}."
        )
    errors = max(result["error_over_sequences"] for result in results.values())
    draws = max(result["error_over_draws"] for result in results.values())
    return f"""The same text in the same order, the same width and depth, the same number of steps.

{table(header, rows)}

{order}

{_beside_gpt2(results)}\
All are scored on the same {document["settings"]["num_sequences"]} held-out sequences. A single value has a standard
error of up to {errors:.3f} from the choice of sequences, which all rows share, and of up to {draws:.3f} from draws of
the noise."""


def _beside_gpt2(results: dict) -> str:
    """What block size 1 differs in from GPT-2, where both were measured."""
    if not {"autoregressive", "1"} <= set(results):
        return ""
    gap = results["1"]["more_than_before"]
    closing = {
        None: "The difference between block size 1 and GPT-2 lies within its errors",
        True: "Block size 1 is **behind** GPT-2",
        False: "Block size 1 is **ahead of** GPT-2",
    }[is_positive(gap)]
    return f"""\
{closing}: {cell(gap)} nats per token. Block size 1 has an autoregressive likelihood, not GPT-2's network: it has
rotary positions where GPT-2 has learned ones, and reads a mask token where GPT-2 reads the token before
({results["1"]["num_parameters"]:,} and {results["autoregressive"]["num_parameters"]:,} parameters; the difference is
the adaptive layer norm's, constant without time conditioning). What block sizes cost is seen from block size 1 on,
where the network is one.

"""


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    results = document["results"]
    figure, panel = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    names = [name for name in results if name != "autoregressive"]
    values = [perplexity(results[name]["nelbo"]) for name in names]
    panel.errorbar(names, [v["mean"] for v in values], [v["standard_error"] or 0 for v in values], fmt="o-", capsize=3)
    panel.axhline(perplexity(results["autoregressive"]["nelbo"])["mean"], color="grey", linestyle="--", label="GPT-2")
    panel.set(xlabel="block size", ylabel="perplexity (bound)")
    panel.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run("likelihood", __doc__, measure)
