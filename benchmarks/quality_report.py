"""The tables and the plot of `benchmarks.quality`, from its JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path


MODELS_HEADER = [
    "model",
    "layers",
    "width",
    "vocabulary",
    "block size",
    "parameters",
    "tokens trained on",
    "held-out nats",
]
SAMPLING_HEADER = ["sampler", "arguments", "forwards per token", "generative perplexity", "entropy, nats"]
SPEED_HEADER = [
    "model",
    "arguments",
    "forwards per token",
    "tokens/s",
    "x GPT-2",
    "generative perplexity",
    "x `first_hitting`'s",
    "x GPT-2's",
    "tokens/s in batches of 8",
    "x batch 1",
]
INFILLING_HEADER = [
    "gaps",
    "number",
    "tokens",
    "filled in",
    "continued",
    "difference",
    "continued, left to right",
    "GPT-2",
]
BOUND_HEADER = ["gaps", "bound, filled in", "bound, continued", "difference", "restored, filled in", "continued"]
NO_SAMPLER = ("held-out text", "GPT-2")


def cell(figure: dict[str, float] | None, digits: int = 2) -> str:
    if figure is None:
        return ""
    return f"{figure['value']:.{digits}f} ± {figure['standard_error']:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sampler_and_arguments(name: str, row: dict) -> list[str]:
    """The first two cells of a row."""
    if name in NO_SAMPLER:
        return [name, ""]
    sampler, *arguments = [
        f"`{value}`" if argument == "sampler" else f"`{argument}={value}`"
        for argument, value in row["arguments"].items()
    ]
    return [sampler, ", ".join(arguments)]


def models_table(results: dict) -> str:
    recipe, rows = results["recipe"], []
    for name, label, num_steps in (
        ("bd3lm", "BD3-LM", recipe["num_steps"]),
        ("gpt2", "GPT-2", recipe["num_steps"]),
        ("judge", "judge, GPT-2", recipe["num_judge_steps"]),
    ):
        is_bd3lm = name == "bd3lm"
        num_tokens = num_steps * recipe["batch_size"] * recipe["length"]
        sizes = [recipe[size] for size in ("num_layers", "hidden_size", "vocab_size")]
        sizes.append(recipe["block_size"] if is_bd3lm else "")
        parameters = f"{recipe['num_parameters'][name]:,}"
        nats = cell(results["likelihood"][name], 3)
        rows.append([label, *map(str, sizes), parameters, f"{num_tokens:,}", f"<= {nats}" if is_bd3lm else nats])
    return table(MODELS_HEADER, rows)


def sampling_table(results: dict) -> str:
    rows = [
        [
            *sampler_and_arguments(name, row),
            cell(row.get("forwards_per_token"), 3),
            cell(row["generative_perplexity"]),
            cell(row["entropy"], 3),
        ]
        for name, row in results["sampling"]["rows"].items()
    ]
    return table(SAMPLING_HEADER, rows)


def speed_table(results: dict) -> str:
    sampled, timed = results["sampling"]["rows"], results["speed"]["tokens_per_second"]
    rows = []
    for name, speed in timed.items():
        perplexity = sampled[name]["generative_perplexity"]
        relative = [
            f"{perplexity['value'] / sampled[other]['generative_perplexity']['value']:.2f}"
            for other in ("first_hitting", "GPT-2")
        ]
        rows.append(
            [
                *sampler_and_arguments(name, sampled[name]),
                f"{sampled[name]['forwards_per_token']['value']:.2f}",
                f"{speed['batch_1']:.0f}",
                f"{speed['batch_1'] / timed['GPT-2']['batch_1']:.2f}",
                cell(perplexity, 1),
                *relative,
                f"{speed['batch_8']:.0f}",
                f"{speed['batch_8'] / speed['batch_1']:.1f}",
            ]
        )
    return table(SPEED_HEADER, rows)


def infilling_table(results: dict) -> str:
    rows = [
        [
            name,
            str(row["num_gaps"]),
            str(row["num_tokens"]),
            *(cell(row.get(figure)) for figure in ("infill", "continue", "continue_less_infill")),
            *(cell(row.get(figure)) for figure in ("continue_left_to_right", "gpt2")),
        ]
        for name, row in results["infilling"]["rows"].items()
    ]
    return table(INFILLING_HEADER, rows)


def bound_table(results: dict) -> str:
    rows = [
        [
            name,
            *(
                cell(row.get(figure))
                for figure in ("infill_bound", "continue_bound", "continue_bound_less_infill_bound")
            ),
            *(cell(row.get(figure)) for figure in ("restored_by_infill", "restored_by_continue")),
        ]
        for name, row in results["infilling"]["rows"].items()
    ]
    return table(BOUND_HEADER, rows)


def tables(results: dict) -> list[str]:
    """Those of the parts that have been measured."""
    parts = {
        "likelihood": [models_table],
        "sampling": [sampling_table],
        "speed": [speed_table],
        "infilling": [infilling_table, bound_table],
    }
    return [make(results) for part, makers in parts.items() if part in results for make in makers]


def insert_tables(results: dict, page: Path | None) -> None:
    """
    Prints the tables, and puts each in the place of the one on the page that has its header.

    Raises:
        ValueError: the page has no table with such a header.
    """
    for new in tables(results):
        print(new, end="\n\n")
        if page is None:
            continue
        lines = page.read_text(encoding="utf-8").split("\n")
        header = new.split("\n", 1)[0]
        if header not in lines:
            raise ValueError(f"`page` {page} must have a table to replace, with the header {header}")
        start = stop = lines.index(header)
        while stop < len(lines) and lines[stop].startswith("|"):
            stop += 1
        page.write_text("\n".join([*lines[:start], new, *lines[stop:]]), encoding="utf-8")


def plot(results: dict, path: Path) -> None:
    """Generative perplexity and entropy over forwards per token, a line for each way to choose the number of them."""
    import matplotlib.pyplot as plt

    rows = results["sampling"]["rows"]
    families: dict[str, list[dict]] = {}
    for name, row in rows.items():
        if name not in NO_SAMPLER:
            names = [argument for argument in row["arguments"] if argument != "sampler"]
            families.setdefault(", ".join([row["arguments"]["sampler"], *names]), []).append(row)
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    labels = {"generative_perplexity": "generative perplexity", "entropy": "entropy of the tokens, nats"}
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        for index, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda row: row["forwards_per_token"]["value"])
            x, y = ([row[name] for row in members] for name in ("forwards_per_token", key))
            panel.errorbar(
                [point["value"] for point in x],
                [point["value"] for point in y],
                [point["standard_error"] for point in y],
                [point["standard_error"] for point in x],
                marker="*" if len(members) == 1 else "o^sDvP"[index % 6],
                markersize=10 if len(members) == 1 else 5,
                capsize=2,
                label=family,
            )
        for name, style in zip(NO_SAMPLER, ("-", "--"), strict=True):
            panel.axhline(rows[name][key]["value"], color="grey", linestyle=style, label=name)
        panel.set(xlabel="forwards per token", ylabel=label)
    panels[0].set_yscale("log")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
