"""
The parts of the recipe, added one by one, at block size 4: `python -m benchmarks.paper.ablation`.

Each row has all parts of the rows above it. The first part, one two-stream pass in place of two passes, changes the
speed alone, so that is what is measured of it.
"""

from collections.abc import Sequence

import torch

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.modeling.diffusion_block_diffusion import forward_process, sample_timesteps

from ..common import interleaved_medians
from ..dense import two_stream_logits
from .experiment import cell, is_positive, over_seeds, paired, perplexity, run, table
from .plots import save_figure
from .two_passes import two_pass_logits
from .workbench import Arm, Workbench


TITLE = "Ablation: the parts one by one"
BLOCK_SIZE = 4
SEARCH = Arm(BLOCK_SIZE, search=True)
# What is trained, and whether the average of its weights is evaluated or those that the last step left.
ROWS = {
    "independent t on the full interval": (Arm(BLOCK_SIZE, antithetic=False), "last"),
    "+ antithetic t": (Arm(BLOCK_SIZE), "last"),
    "+ clipped interval, (0.5, 1]": (Arm(BLOCK_SIZE, noise_interval=(0.5, 1.0)), "last"),
    "+ search for the interval": (SEARCH, "last"),
    "+ moving average of the weights": (SEARCH, "average"),
    "+ exact-count masking": (Arm(BLOCK_SIZE, search=True, masking="exact_count"), "average"),
}
PASSES = ("two passes", "one dense two-stream pass", "one two-stream pass of the package")


def step_seconds(bench: Workbench, model: BD3LMForMaskedLM) -> dict[str, float]:
    """Seconds of forward and backward passes over a training batch, by each formulation of the same loss."""
    config = model.config
    rows = bench.train_sequences.select(range(bench.scale.batch_size)).lists()
    x_0 = torch.tensor(rows, device=bench.device)
    t = sample_timesteps(len(x_0), -(-x_0.shape[1] // config.block_size), (0.5, 1.0), device=x_0.device)
    t = t.repeat_interleave(config.block_size, dim=1)[:, : x_0.shape[1]]
    x_t = forward_process(x_0, t, config.mask_token_id)
    weights = torch.where(x_t == config.mask_token_id, 1 / t, 0.0)

    def plain_step(logits_of) -> float:
        nats = torch.nn.functional.cross_entropy(
            logits_of(model, x_t, x_0).flatten(0, 1), x_0.flatten(), reduction="none"
        )
        return finished((nats * weights.flatten()).sum() / x_0.numel())

    def finished(loss: torch.Tensor) -> float:
        loss.backward()
        model.zero_grad()
        # Waits for the device.
        return loss.item()

    def own_step() -> float:
        return finished(model(input_ids=x_t, clean_input_ids=x_0, labels=x_0, loss_weights=weights).loss)

    steps = (lambda: plain_step(two_pass_logits), lambda: plain_step(two_stream_logits), own_step)
    return interleaved_medians(dict(zip(PASSES, steps, strict=True)), repeats=11)


def measure(bench: Workbench, seeds: Sequence[int]) -> dict:
    seconds = [bench.measured(SEARCH, seed, "passes", lambda model: step_seconds(bench, model)) for seed in seeds]
    parts, before = {}, None
    for name, (arm, weights) in ROWS.items():
        nelbo = over_seeds(bench.record(arm, seed)[weights]["nelbo"] for seed in seeds)
        parts[name] = {"nelbo": nelbo, "change": None if before is None else paired(nelbo, before)}
        before = nelbo
    return {
        "speed": {name: over_seeds(found[PASSES[0]] / found[name] for found in seconds) for name in PASSES},
        "parts": parts,
    }


def section(document: dict) -> str:
    results = document["results"]
    parts = results["parts"]
    judged = {
        name: {True: "worse", False: "better", None: "not told apart"}[is_positive(each["change"])]
        for name, each in parts.items()
        if each["change"]
    }
    rows = [
        [
            name,
            cell(perplexity(each["nelbo"]), 2),
            cell(each["nelbo"]),
            cell(each["change"]) if each["change"] else "",
            judged.get(name, ""),
        ]
        for name, each in parts.items()
    ]
    helps = [name for name, verdict in judged.items() if verdict == "better"]
    helpless = [f"{name[2:]} ({verdict})" for name, verdict in judged.items() if verdict != "better"]
    text = f"""Block size {BLOCK_SIZE}.

{table(["parts", "perplexity", "nats per token", "change", ""], rows)}

Outside the errors better: {", ".join(name[2:] for name in helps) or "none"}."""
    if helpless:
        text += f" **Not so:** {', '.join(helpless)}."
    speed = [[name, cell(each, 2)] for name, each in results["speed"].items()]
    return f"""{text}

Speed, relative to two passes (medians of 11 interleaved steps of {document["settings"]["batch_size"]} sequences):

{table(["forward and backward", "speed"], speed)}"""


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.5, 3), layout="constrained")
    parts = document["results"]["parts"]
    values = [perplexity(each["nelbo"]) for each in parts.values()]
    errors = [value["standard_error"] or 0 for value in values]
    panel.errorbar([value["mean"] for value in values], list(parts), xerr=errors, fmt="o", capsize=3)
    panel.invert_yaxis()
    panel.set(xlabel="perplexity")
    save_figure(figure, path)


if __name__ == "__main__":
    run("ablation", __doc__, measure)
