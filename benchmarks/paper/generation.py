"""
Samples by block size and forwards per token: `python -m benchmarks.paper.generation`.

Samples have the training length and begin with BOS alone; EOS is a token like any other. The judge is the
autoregressive model that was trained on the same text with the same seed.
"""

from collections.abc import Collection, Sequence

import torch

from bd3lm_hf import evaluate_likelihood
from bd3lm_hf.evaluation.quality import sample_statistics

from .experiment import cell, over_seeds, parts_of, perplexity, run, table
from .plots import save_figure
from .scales import Scale
from .workbench import AUTOREGRESSIVE, TUNED_BLOCK_SIZE_ONE, Arm, Workbench


TITLE = "Samples: quality against forwards per token"


def arms(scale: Scale) -> dict[str, Arm]:
    return {
        "1": TUNED_BLOCK_SIZE_ONE,
        "4": Arm(4, search=True),
        "16": Arm(16, search=True),
        "length": Arm(scale.length),
    }


def samplers(block_size: int) -> dict[str, dict]:
    """Arguments of `generate`: one token a forward, and two and four on average."""
    ways = {"first hitting": {"sampler": "first_hitting"}}
    for tokens in (2, 4):
        if tokens <= block_size:
            for name in ("ancestral", "confidence"):
                ways[f"{name}, {block_size // tokens} steps"] = {
                    "sampler": name,
                    "denoising_steps": block_size // tokens,
                }
    return ways


def judged(bench: Workbench, samples: Sequence[Sequence[int]], seed: int) -> dict:
    """Nats per token under the judge, and the mean entropy of a sample."""
    judge = bench.trained(AUTOREGRESSIVE, seed)
    statistics = sample_statistics(samples, bos_token_id=bench.tokenizer.bos_token_id)
    return {
        "nll": evaluate_likelihood(judge, samples, batch_size=32, progress=False).nelbo,
        "entropy": statistics.entropy.value,
    }


def sample(bench: Workbench, model, seed: int) -> dict:
    """What each sampler writes, judged."""
    new_tokens = bench.scale.length - 1
    prompts = torch.full((4 * bench.scale.num_samples, 1), bench.tokenizer.bos_token_id, device=bench.device)
    found = {}
    for name, arguments in samplers(model.config.block_size).items():
        output = model.generate(
            prompts,
            max_new_tokens=new_tokens,
            seed=1_000_000 * seed,
            return_dict_in_generate=True,
            **arguments,
        )
        forwards = torch.as_tensor(output.num_forward_passes).double().mean().item()
        found[name] = {
            "forwards_per_token": forwards / new_tokens,
            **judged(bench, output.sequences.tolist(), seed),
        }
    return found


def measure(bench: Workbench, seeds: Sequence[int], parts: Collection[str] | None = None) -> dict:
    results = {}
    for size, arm in parts_of(arms(bench.scale), parts).items():
        found = [
            bench.measured(arm, seed, "samples", lambda model, seed=seed: sample(bench, model, seed)) for seed in seeds
        ]
        results[size] = {
            name: {
                figure: over_seeds(each[name][figure] for each in found)
                for figure in ("forwards_per_token", "nll", "entropy")
            }
            for name in samplers(arm.block_size)
        }
    text = [
        bench.measured(
            AUTOREGRESSIVE, seed, "text", lambda _, seed=seed: judged(bench, bench.held_out_sequences, seed)
        )
        for seed in seeds
    ]
    return {
        "samples": results,
        "text": {figure: over_seeds(each[figure] for each in text) for figure in ("nll", "entropy")},
    }


def section(document: dict) -> str:
    results, settings = document["results"], document["settings"]
    rows = [
        [size, name, cell(each["forwards_per_token"], 2), cell(perplexity(each["nll"]), 1), cell(each["entropy"], 2)]
        for size, ways in results["samples"].items()
        for name, each in ways.items()
    ]
    text = results["text"]
    rows.append(["", "held-out text", "", cell(perplexity(text["nll"]), 1), cell(text["entropy"], 2)])
    header = ["block size", "sampler", "forwards per token", "perplexity under the judge", "entropy, nats"]
    one_forward = {size: ways["first hitting"]["nll"]["mean"] for size, ways in results["samples"].items()}
    ordered = list(one_forward) == sorted(one_forward, key=one_forward.get)
    order = (
        "At one forward per token quality falls with the block size, as in the paper."
        if ordered
        else "At one forward per token quality **does not fall** with every larger block size: the order is "
        f"{', '.join(sorted(one_forward, key=one_forward.get))}."
    )
    number = 4 * settings["num_samples"]
    return f"""{number} samples of {settings["length"]} tokens for each row and seed. Repetition lowers the perplexity,
and the entropy with it.

{table(header, rows)}

{order}"""


def plot(document: dict, path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for number, (size, ways) in enumerate(document["results"]["samples"].items()):
        for name, each in ways.items():
            marker = {"f": "o", "a": "s", "c": "^"}[name[0]]
            panel.plot(each["forwards_per_token"]["mean"], perplexity(each["nll"])["mean"], marker, color=f"C{number}")
        panel.plot([], [], "o", color=f"C{number}", label=f"block size {size}")
    for marker, name in (("s", "ancestral"), ("^", "confidence")):
        panel.plot([], [], marker, color="grey", label=name)
    panel.axhline(perplexity(document["results"]["text"]["nll"])["mean"], color="grey", label="held-out text")
    panel.set(xlabel="forwards per token", ylabel="perplexity under the judge", yscale="log")
    panel.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    run("generation", __doc__, measure)
