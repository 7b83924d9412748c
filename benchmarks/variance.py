"""
How much the training loss and its gradient vary with the noise: `python -m benchmarks.variance`.

Trains one small model per block size on the Python standard library, then measures on held-out text: (a) the one-pass
search of the noise interval against brute force, (b) the interval that it chooses against the full one, (c)
exact-count against Bernoulli masking, (d) several noised copies of each sequence against one. `±` is one standard
error; differences and ratios are paired over the same sequences or batches.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from transformers import set_seed

from bd3lm_hf import BD3LMConfig, BD3LMDataCollator, BD3LMForMaskedLM, load_documents, pack_documents, train_tokenizer
from bd3lm_hf.data.documents import draw_sequences, limit_bytes, split_documents
from bd3lm_hf.evaluation.block_losses import BlockLosses, score_blocks
from bd3lm_hf.evaluation.estimate import Estimate, sum_per_sequence
from bd3lm_hf.evaluation.variance import gradient_variance, nelbo_variance
from bd3lm_hf.modeling.diffusion_block_diffusion import FULL_NOISE_INTERVAL
from bd3lm_hf.modeling.two_stream_block_diffusion import TextBlocks
from bd3lm_hf.noise.intervals import INTERVAL_WIDTHS, noise_interval_grid
from bd3lm_hf.noise.sampler import NoiseSampler
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.trainer import BD3LMTrainer

from .common import interleaved_medians, machine, print_table


LENGTH, BATCH_SIZE = 128, 8
# Of passes without gradients.
PASS = {"batch_size": 32, "progress": False}
SAMPLERS = {
    "Bernoulli, 1 copy": NoiseSampler(),
    "Bernoulli, 2 copies": NoiseSampler(num_copies=2),
    "exact count, 1 copy": NoiseSampler(masking="exact_count"),
    "exact count, 2 copies": NoiseSampler(masking="exact_count", num_copies=2),
    "2 complementary copies": NoiseSampler(num_copies=2, complementary=True),
}
BASELINE, COMPLEMENTARY = "Bernoulli, 1 copy", "2 complementary copies"
# Below it brute force meets too few masked tokens to know its own error: a token at t = 0.001 weighs 1000, and is
# masked once in 1000 times.
HEAVY_TAIL = 0.05


def prepare_text(num_sequences: int):
    """Packed sequences of the built-in corpus: (for training, for its evaluations, held out as lists, tokenizer)."""
    splits = split_documents(load_documents("builtin"), 0.1)
    documents = limit_bytes(splits["train"], 4_000_000)
    tokenizer = train_tokenizer(documents, 2048)
    train = pack_documents(documents, tokenizer, LENGTH)
    held_out = draw_sequences(pack_documents(splits["held_out"], tokenizer, LENGTH), num_sequences + 128)
    evaluation = held_out.select(range(128))
    return train, evaluation, held_out.select(range(128, len(held_out)))["input_ids"], tokenizer


def train_model(block_size: int, train, evaluation, tokenizer, num_steps: int, folder: Path) -> BD3LMForMaskedLM:
    """The model of `bd3lm demo`, its noise interval chosen by evaluations; kept in `folder`."""
    if (folder / "config.json").exists():
        return BD3LMForMaskedLM.from_pretrained(folder)
    set_seed(0)
    config = BD3LMConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        block_size=block_size,
        hidden_dropout=0.0,
        tie_word_embeddings=True,
        initializer_range=0.08,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = BD3LMTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_steps=num_steps,
        eval_strategy="steps",
        eval_steps=max(num_steps // 6, 1),
        per_device_eval_batch_size=PASS["batch_size"],
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        logging_steps=100,
    )
    model = BD3LMForMaskedLM(config)
    trainer = BD3LMTrainer(model, args, train_dataset=train, eval_dataset=evaluation)
    trainer.train()
    trainer.save_model()
    return model


def search_against_brute_force(model, sequences, num_draws: int) -> dict:
    """(a): NELBO variance of each interval of the grid, from one pass for all and from passes of its own."""
    chosen, one_pass = BlockLosses.of_sequences(model, sequences, seed=1, **PASS).least_variance_interval()
    brute_force = {
        interval: nelbo_variance(model, sequences, interval, num_draws=num_draws, seed=2 + number, **PASS)
        for number, interval in enumerate(noise_interval_grid())
    }
    found = min(brute_force, key=lambda interval: brute_force[interval].value)
    differences = {interval: one_pass[interval] - brute_force[interval] for interval in one_pass}
    return {
        "one_pass": one_pass,
        "brute_force": brute_force,
        "z": {interval: gap.value / gap.standard_error for interval, gap in differences.items()},
        "chosen": chosen,
        "chosen_by_brute_force": found,
        "excess_of_choice": brute_force[chosen] / brute_force[found],
    }


def mean_loss(model, sequences, noise_interval, masking: str, num_draws: int, seed: int) -> Estimate:
    """Mean over blocks of the training loss per token, in nats."""
    sampler = NoiseSampler(antithetic=False, masking=masking)
    columns = score_blocks(
        model, sequences, noise_interval, sampler, weighted=True, num_draws=num_draws, seed=seed, **PASS
    )
    loss = columns["loss"] / columns["num_tokens"]
    return Estimate(loss.mean(), sum_per_sequence((loss - loss.mean()) / len(loss), columns["sequence"]))


def masking_against_bernoulli(model, sequences, noise_interval, num_draws: int) -> dict:
    """(c): mean and variance of the loss under exact-count and under Bernoulli masking, by brute force."""
    means = [
        mean_loss(model, sequences, noise_interval, masking, num_draws, seed=100 + number)
        for number, masking in enumerate(("bernoulli", "exact_count"))
    ]
    variances = [
        nelbo_variance(
            model, sequences, noise_interval, masking=masking, num_draws=num_draws, seed=100 + number, **PASS
        )
        for number, masking in enumerate(("bernoulli", "exact_count"))
    ]
    return {
        "mean": means[0],
        "difference_of_means": means[1] - means[0],
        "variance": variances[0],
        "ratio_of_variances": variances[1] / variances[0],
    }


def gradient_variances(model, batches, noise_interval, names) -> dict[str, Estimate]:
    """Over texts, t and masks, for each of some ways to draw noise."""
    return {
        name: gradient_variance(model, batches, noise_interval, noise_sampler=SAMPLERS[name], progress=False)
        for name in names
    }


def variances_given_the_text(model, batches, noise_interval, names, num_draws: int = 4) -> dict[str, Estimate]:
    """The share of the noise: the mean over batches of the gradient variance of one batch under several draws."""
    estimates = {}
    for name in names:
        variances = [
            gradient_variance(
                model,
                [batch] * num_draws,
                noise_interval,
                noise_sampler=SAMPLERS[name],
                seed=1000 + number,
                progress=False,
            ).value
            for number, batch in enumerate(batches)
        ]
        value = float(np.mean(variances))
        estimates[name] = Estimate(value, (np.array(variances) - value) / len(variances))
    return estimates


def relative_seconds(model, batch, noise_interval, repeats: int, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Seconds of one step (drawing noise, forward, backward) and relative to the baseline, interleaved."""
    config, x_0 = model.config, batch["input_ids"]

    def make_step(sampler: NoiseSampler):
        blocks = TextBlocks.of_batch(config, x_0, batch["labels"])
        seeds = iter(range(10**9))

        def step() -> None:
            noise = sampler.draw(config, noise_interval, x_0, blocks, range(len(x_0)), len(x_0), (next(seeds),))
            model(**{**batch, **noise.inputs(x_0)}).loss.backward()
            model.zero_grad()

        return step

    steps = {name: make_step(sampler) for name, sampler in SAMPLERS.items()}
    medians = [interleaved_medians(steps, repeats) for _ in range(rounds)]
    relative = {name: [seconds[name] / seconds[BASELINE] for seconds in medians] for name in SAMPLERS}
    return {
        name: {
            "seconds": mean(seconds[name] for seconds in medians),
            "relative": mean(values),
            "relative_standard_error": stdev(values) / math.sqrt(rounds),
        }
        for name, values in relative.items()
    }


def measure(block_size: int, train, evaluation, held_out, tokenizer, arguments) -> dict:
    """All figures of one block size."""
    folder = arguments.output_dir / f"block{block_size}"
    model = train_model(block_size, train, evaluation, tokenizer, arguments.max_steps, folder)
    model.eval()
    search = search_against_brute_force(model, held_out, arguments.num_draws)
    chosen = search["chosen"]
    collate = BD3LMDataCollator(tokenizer.pad_token_id)
    rows = [{"input_ids": ids} for ids in held_out]
    batches = [collate(rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE)]
    intervals = {"full": FULL_NOISE_INTERVAL, "chosen": chosen}
    # Of the full interval only what is compared; complementary masks are made for a symmetric one.
    names = {"full": [BASELINE, "exact count, 1 copy", COMPLEMENTARY], "chosen": list(SAMPLERS)}
    half = batches[: len(batches) // 2]
    return {
        "likelihood": BlockLosses.of_sequences(model, held_out, seed=3, **PASS).nelbo(),
        "search": search,
        "masking": {
            key: masking_against_bernoulli(model, held_out, interval, arguments.num_draws)
            for key, interval in intervals.items()
        },
        "gradient_variance": {
            key: gradient_variances(model, batches, interval, names[key]) for key, interval in intervals.items()
        },
        "given_the_text": {
            key: variances_given_the_text(model, half, interval, names[key]) for key, interval in intervals.items()
        },
        "seconds": relative_seconds(model, batches[0], chosen, arguments.repeats),
    }


def cell(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.standard_error:.{digits}f}"


def name_of(interval: tuple[float, float]) -> str:
    return f"({interval[0]:g}, {interval[1]:g})"


def report(results: dict[int, dict]) -> None:
    """The tables, in Markdown."""
    print("\n### (a) One-pass search against brute force\n")
    rows = []
    for block_size, result in results.items():
        search = result["search"]
        found = search["chosen_by_brute_force"]
        z = [abs(value) for (beta, _), value in search["z"].items() if beta >= HEAVY_TAIL]
        rows.append(
            [
                str(block_size),
                cell(result["likelihood"]),
                name_of(search["chosen"]),
                cell(search["one_pass"][search["chosen"]]),
                name_of(found),
                cell(search["brute_force"][found]),
                cell(search["excess_of_choice"]),
                f"{max(z):.2f}",
            ]
        )
    header = ["block size", "NELBO, nats per token", "search", "its variance", "brute force", "its variance"]
    print_table([*header, "variance of the search's choice / least", "max abs(z) of the 30 from t = 0.05 on"], rows)
    for block_size, result in results.items():
        search = result["search"]
        print(f"\nNELBO variance at block size {block_size}\n")
        print_table(
            ["interval", "one pass", "brute force", "z"],
            [
                [
                    name_of(interval),
                    cell(estimate),
                    cell(search["brute_force"][interval]),
                    f"{search['z'][interval]:.2f}",
                ]
                for interval, estimate in search["one_pass"].items()
            ],
        )

    print("\n### (b) The chosen interval against the full one, (1e-3, 1] (Bernoulli masking)\n")
    rows = []
    for block_size, result in results.items():
        nelbo = [result["search"]["brute_force"][key] for key in (FULL_NOISE_INTERVAL, result["search"]["chosen"])]
        total = [result["gradient_variance"][name][BASELINE] for name in ("full", "chosen")]
        given = [result["given_the_text"][name][BASELINE] for name in ("full", "chosen")]
        for label, (full, chosen) in {
            "NELBO": nelbo,
            "gradient": total,
            "gradient, given the text": given,
        }.items():
            rows.append([str(block_size), label, cell(full), cell(chosen), cell(chosen / full)])
    print_table(["block size", "variance of the", "full interval", "chosen interval", "ratio"], rows)

    print("\n### (c) Exact-count against Bernoulli masking\n")
    rows = []
    for block_size, result in results.items():
        for name, masking in result["masking"].items():
            total = result["gradient_variance"][name]
            given = result["given_the_text"][name]
            rows.append(
                [
                    str(block_size),
                    name,
                    cell(masking["mean"]),
                    cell(masking["difference_of_means"], 4),
                    cell(masking["ratio_of_variances"]),
                    cell(total["exact count, 1 copy"] / total[BASELINE]),
                    cell(given["exact count, 1 copy"] / given[BASELINE]),
                ]
            )
    header = ["block size", "interval", "mean loss", "difference of means", "ratio of NELBO variances"]
    print_table([*header, "of gradient variances", "given the text"], rows)

    print("\n### (d) Several copies, under the chosen interval; relative to one Bernoulli-masked copy\n")
    rows = []
    for block_size, result in results.items():
        for name, key in [*((name, "chosen") for name in SAMPLERS), (COMPLEMENTARY, "full")]:
            # Complementary copies predict each token once, whatever the interval: they cost the same.
            seconds = result["seconds"][name]
            ratio, ratio_given = (
                result[kind][key][name] / result[kind]["chosen"][BASELINE]
                for kind in ("gradient_variance", "given_the_text")
            )
            rows.append(
                [
                    str(block_size),
                    name if key == "chosen" else f"{name}, full interval",
                    cell(ratio),
                    cell(ratio_given),
                    f"{seconds['relative']:.3f} ± {seconds['relative_standard_error']:.3f}",
                    cell(times_seconds(ratio, seconds)),
                    cell(times_seconds(ratio_given, seconds)),
                ]
            )
    header = ["block size", "noise", "gradient variance", "given the text", "seconds per step", "variance x seconds"]
    print_table([*header, "given the text, x seconds"], rows)


def times_seconds(ratio: Estimate, seconds: dict[str, float]) -> Estimate:
    """The product with relative seconds, whose error counts as that of one more independent unit."""
    influence = np.append(ratio.influence * seconds["relative"], ratio.value * seconds["relative_standard_error"])
    return Estimate(ratio.value * seconds["relative"], influence)


def plot(results: dict[int, dict], path: Path) -> None:
    """NELBO variance of each interval: one line per width over its start, brute force as crosses."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(5.5 * len(results), 4), squeeze=False, layout="constrained"
    )
    for panel, (block_size, result) in zip(panels[0], results.items(), strict=True):
        search = result["search"]
        for width in INTERVAL_WIDTHS:
            intervals = [key for key in search["one_pass"] if round(key[1] - key[0], 2) == width]
            starts = [beta for beta, _ in intervals]
            values = [search["one_pass"][key] for key in intervals]
            panel.errorbar(
                starts,
                [estimate.value for estimate in values],
                [estimate.standard_error for estimate in values],
                label=f"width {width}",
                capsize=2,
            )
            panel.plot(starts, [search["brute_force"][key].value for key in intervals], "kx", markersize=4)
        panel.plot([], [], "kx", markersize=4, label="brute force")
        panel.axhline(search["one_pass"][FULL_NOISE_INTERVAL].value, color="grey", label="full interval")
        panel.set(title=f"block size {block_size}", xlabel="start of the interval", yscale="log")
        panel.set_ylabel("variance of a block's NELBO, (nats per token)²")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def to_json(value):
    """Estimates as {value, standard_error}; intervals as keys and values in words."""
    if isinstance(value, Estimate):
        return {"value": value.value, "standard_error": value.standard_error}
    if isinstance(value, dict):
        return {name_of(key) if isinstance(key, tuple) else key: to_json(item) for key, item in value.items()}
    return name_of(value) if isinstance(value, tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="models, variance.json and variance.png")
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--max_steps", type=int, default=1200, help="training steps of each model")
    parser.add_argument("--num_sequences", type=int, default=512, help="held-out sequences of 128 tokens")
    parser.add_argument("--num_draws", type=int, default=2, help="passes of brute force for each interval")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each kind in each of 5 rounds")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    train, evaluation, held_out, tokenizer = prepare_text(arguments.num_sequences)
    print(f"Variance on {machine()}; {len(held_out)} held-out sequences of {LENGTH} tokens, batches of {BATCH_SIZE}")
    results = {
        size: measure(size, train, evaluation, held_out, tokenizer, arguments) for size in arguments.block_sizes
    }
    report(results)
    (arguments.output_dir / "variance.json").write_text(json.dumps(to_json(results), indent=2) + "\n")
    plot(results, arguments.output_dir / "variance.png")


if __name__ == "__main__":
    main()
