"""What every experiment is: a measurement that a command runs and writes as JSON, and figures that are shown."""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import datasets
import torch
import transformers

import bd3lm_hf

from .scales import SCALES
from .workbench import Workbench, write_json


RESULTS = Path(__file__).with_name("results")
# A difference counts if it is this many standard errors from 0 and has one sign in all seeds.
ENOUGH_ERRORS = 2


def over_seeds(values: Iterable[float]) -> dict:
    """Mean over seeds with its standard error (None for a single seed), and the values."""
    values = [float(value) for value in values]
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error, "values": values}


def paired(first: dict, second: dict) -> dict:
    """The difference of two `over_seeds`, seed by seed."""
    return over_seeds(a - b for a, b in zip(first["values"], second["values"], strict=True))


def is_positive(difference: dict) -> bool | None:
    """Whether a difference is above 0, or below; None where its errors do not tell."""
    signs = {value > 0 for value in difference["values"]}
    error = difference["standard_error"]
    if error is None or len(signs) > 1 or abs(difference["mean"]) < ENOUGH_ERRORS * error:
        return None
    return signs.pop()


def perplexity(nelbo: dict) -> dict:
    return over_seeds(math.exp(value) for value in nelbo["values"])


def cell(value: dict, digits: int = 3) -> str:
    """Mean and standard error over seeds."""
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval_name(interval: Sequence[float]) -> str:
    return "({:g}, {:g}]".format(*interval)


def run(name: str, description: str, measure: Callable[[Workbench, Sequence[int]], dict], argv=None) -> None:
    """
    The command of an experiment.

    Args:
        name: that of its module.
        description: its docstring.
        measure: takes the workbench and the seeds, and returns the results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--data", default="builtin", help="a text file, or `builtin`: the Python standard library's own source"
    )
    parser.add_argument("--data_name", help="what the results call the text")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("bd3lm-trained/paper"), help="where models and measurements are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is written")
    parser.add_argument("--seeds", type=int, nargs="+", help="measure some of the seeds only, and write no JSON")
    arguments = parser.parse_args(argv)

    datasets.disable_progress_bars()
    scale = SCALES[arguments.scale]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Workbench(scale, arguments.data, arguments.output_dir, device)
    seeds = arguments.seeds or list(range(scale.num_seeds))
    results = measure(bench, seeds)
    if arguments.seeds:
        return
    threads = torch.get_num_threads()
    data_name = arguments.data_name or {"builtin": "the Python standard library"}.get(arguments.data, "a text file")
    tokens = "bytes" if len(bench.tokenizer) <= 260 else f"{len(bench.tokenizer)} byte-level BPE tokens"
    path = arguments.results / f"{name}.{arguments.scale}.json"
    write_json(
        path,
        {
            "experiment": name,
            "scale": arguments.scale,
            "settings": asdict(scale),
            "data": f"{data_name}, {bench.num_bytes / 1e6:.1f} MB, {tokens}",
            "machine": torch.cuda.get_device_name()
            if device == "cuda"
            else f"{os.cpu_count()} CPU cores, {threads} thread{'s' * (threads > 1)} a run",
            "versions": {
                "bd3lm_hf": bd3lm_hf.__version__,
                "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__,
            },
            "seeds": seeds,
            "seconds": bench.used_seconds,
            "results": results,
        },
    )
    print(f"wrote {path}")
