"""
Block size 1, the standard objective against the tuned schedule: `python -m benchmarks.paper.block_size_one`.

With t ~ U(0, 1] a token is masked with probability t and weighs 1 / t; at t = 1 every token is predicted, and weighs
1. The mean of both objectives is the autoregressive likelihood; only their variance differs. All are trained from
new weights on.
"""

from collections.abc import Sequence

from .experiment import cell, is_positive, over_seeds, paired, perplexity, run, table
from .plots import save_figure
from .workbench import AUTOREGRESSIVE, Arm, Workbench


TITLE = "Block size 1: the standard objective against the tuned schedule"
# Without a base, which would give the standard objective a tuned beginning.
ARMS = {
    "autoregressive (GPT-2)": AUTOREGRESSIVE,
    "standard": Arm(1, stage="whole"),
    "tuned": Arm(1, noise_interval=(1.0, 1.0), stage="whole"),
}
# Perplexities on LM1B, arXiv 2503.09573.
PAPER = {"autoregressive (GPT-2)": "22.88", "standard": "25.56", "tuned": "22.88"}


def measure(bench: Workbench, seeds: Sequence[int]) -> dict:
    nelbo = {
        name: over_seeds(bench.record(arm, seed)["average"]["nelbo"] for seed in seeds) for name, arm in ARMS.items()
    }
    return {
        "nelbo": nelbo,
        "standard_more_than_tuned": paired(nelbo["standard"], nelbo["tuned"]),
        "tuned_more_than_autoregressive": paired(nelbo["tuned"], nelbo["autoregressive (GPT-2)"]),
    }


def section(document: dict) -> str:
    results = document["results"]
    rows = [[name, cell(perplexity(nelbo), 2), cell(nelbo), PAPER[name]] for name, nelbo in results["nelbo"].items()]
    gap, rest = results["standard_more_than_tuned"], results["tuned_more_than_autoregressive"]
    verdict = {
        True: "The tuned schedule is better, outside the errors, as in the paper",
        False: "The tuned schedule is **worse**: the finding does not reproduce",
        None: "The errors **do not tell** the two apart",
    }[is_positive(gap)]
    text = f"""{table(["objective", "perplexity", "nats per token", "paper: LM1B"], rows)}

{verdict}: the standard objective costs {cell(gap)} nats per token on top."""
    share = gap["mean"] + rest["mean"]
    if is_positive(gap) and share > 0:
        text += f" Of its distance to GPT-2, {share:.3f}, the tuned schedule closes {min(gap['mean'] / share, 1):.0%}"
        text += f"; {cell(rest)} is left, another network's."
    return text


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for number, (name, nelbo) in enumerate(document["results"]["nelbo"].items()):
        panel.plot([name] * len(nelbo["values"]), perplexity(nelbo)["values"], "o", color=f"C{number}")
    panel.set(ylabel="perplexity, each seed")
    save_figure(figure, path)


if __name__ == "__main__":
    run("block_size_one", __doc__, measure)
