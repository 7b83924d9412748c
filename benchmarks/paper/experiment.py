"""What every experiment is: a measurement that a command runs and writes as JSON, and figures that are shown."""

import argparse
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers

import bd3lm_hf

from .scales import SCALES
from .workbench import Workbench, write_json


RESULTS = Path(__file__).with_name("results")
# A difference counts if it is this many standard errors from 0 and has one sign in all seeds.
ENOUGH_ERRORS = 2
# What results call the texts that have a name.
DATA_NAMES = {"builtin": "the Python standard library", "packages": "the Python sources of the installed packages"}


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


def parts_of(arms: dict, parts: Collection[str] | None) -> dict:
    """Those of an experiment's arms that are asked for by name, in their order; None asks for all."""
    return arms if parts is None else {name: arm for name, arm in arms.items() if name in parts}


def run(name: str, description: str, measure: Callable[[Workbench, Sequence[int]], dict], argv=None) -> None:
    """
    The command of an experiment.

    Args:
        name: that of its module.
        description: its docstring.
        measure: takes the workbench and the seeds, and returns the results.
    """
    parser = experiment_parser(description)
    parser.add_argument("--seeds", type=int, nargs="+", help="measure some of the seeds only, and write no JSON")
    arguments = parser.parse_args(argv)
    scale = SCALES[arguments.scale]
    bench = Workbench(scale, arguments.data, arguments.output_dir, device(), arguments.torch_compile)
    seeds = arguments.seeds or list(range(scale.num_seeds))
    results = measure(bench, seeds)
    if arguments.seeds:
        return
    path = arguments.results / f"{name}.{arguments.scale}.json"
    measured = {"seeds": seeds, "seconds": bench.used_seconds, "results": results}
    write_json(path, {"experiment": name, **circumstances(bench, arguments), **measured})
    print(f"wrote {path}")


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """The flags that say what is trained on what, and where it is written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--data",
        default="builtin",
        help="a text file or a folder of them, `builtin` (the Python standard library's own source), or `packages` "
        "(that and the sources of the installed packages)",
    )
    parser.add_argument("--data_name", help="what the results call the text")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("bd3lm-trained/paper"), help="where models and measurements are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is written")
    parser.add_argument(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        help="whether training is compiled (default: as the trainer has it on the device)",
    )
    return parser


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def circumstances(bench: Workbench, arguments: argparse.Namespace) -> dict:
    """What a document of results says of how they were got."""
    data_name = arguments.data_name or DATA_NAMES.get(arguments.data, "a text file")
    tokens = "bytes" if len(bench.tokenizer) <= 260 else f"{len(bench.tokenizer)} byte-level BPE tokens"
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} CPU cores, {threads} thread{'s' * (threads > 1)} a run"
    return {
        "scale": arguments.scale,
        "settings": asdict(bench.scale),
        "data": f"{data_name}, {bench.num_bytes / 1e6:.1f} MB, {tokens}",
        "machine": cores if bench.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {
            "bd3lm_hf": bd3lm_hf.__version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
    }
