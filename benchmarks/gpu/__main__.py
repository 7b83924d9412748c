"""
What a GPU gives, in six minutes: `make gpu`, or `python -m benchmarks.gpu --results FOLDER`.

The test suite on the device; training (forward and backward, bfloat16 by autocast) and generation (nucleus 0.9, new
tokens) of both networks, beside the autoregressive model of the same shape and the paper's formulation: tokens per
second, MFU, peak memory, and how often the host launches and waits, per training step or forward. Nothing is needed
beyond torch, Transformers and Accelerate, and pytest for the tests. Lines compile side by side and are then measured
one after the other. A line that fails says how, one that there was no time left for says so, and the folder holds what
there was when a run ended.

`--ways ATTENTION:MODE[:BUDGET]` adds ways to compile the training step, say `flex_attention:reduce-overhead:0.8` for
the mode of `torch.compile` and the memory budget of `compile_training`. The JSON has the longest kernels of a step.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..common import machine, peak_tflops
from .lines import all_lines, compiled_way
from .networks import SIZES, SMOLLM2
from .processes import measure_lines, measure_lines_here
from .results import LOG_FILE, TESTS_FILE, Results
from .suite import SuiteRun


# Two or three of so many train, each with up to 35 GiB.
MOST_PROCESSES = 6
PARTS, NETWORKS = ("training", "generation"), ("published", "adapted")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--results", type=Path, default=Path("bd3lm-gpu"), help="folder of the table and the JSON")
    parser.add_argument("--skip", nargs="*", choices=["tests", *PARTS, *NETWORKS], default=[])
    parser.add_argument("--ways", nargs="*", default=[], help="see above")
    parser.add_argument("--seconds", type=float, default=345.0, help="of all of it")
    parser.add_argument(
        "--processes", type=int, help="that prepare lines at a time; 0: all in this one (default: by the cores)"
    )
    parser.add_argument("--test_processes", type=int, default=6, help="of the tests, where pytest-xdist is installed")
    parser.add_argument("--test_seconds", type=float, default=240.0, help="of the tests, at most")
    parser.add_argument("--tests", nargs="*", default=[], help="test files (default: all that run on the device)")
    arguments = parser.parse_args(argv)
    try:
        arguments.ways = [compiled_way(text) for text in arguments.ways]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def about(arguments: argparse.Namespace) -> dict:
    """Where and what is measured."""
    where = machine(arguments.device, "bfloat16")
    peak = peak_tflops(torch.cuda.get_device_name()) if arguments.device == "cuda" else None
    size = SIZES[arguments.size]
    sentence = f"On {where}. MFU "
    sentence += "is not known there." if peak is None else f"of {peak} TFLOP/s, dense bfloat16 as the maker states it."
    adapted = "SmolLM2-135M's" if size.adapted is SMOLLM2 else "a tiny"
    sentence += f" Published network: {size.published}; adapted network: {adapted} shape, the same batches."
    return {"sentence": sentence, "machine": where, "peak_tflops": peak, "size": arguments.size}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs all of it; 1 if something failed."""
    deadline = time.monotonic()
    arguments = parse_arguments(argv)
    deadline += arguments.seconds
    networks, parts = ([name for name in names if name not in arguments.skip] for names in (NETWORKS, PARTS))
    lines = all_lines(networks, parts, SIZES[arguments.size].num_texts, arguments.ways)
    results = Results(arguments.results, lines, about(arguments))
    print(results.about["sentence"], flush=True)
    num_processes = arguments.processes
    if num_processes is None:
        num_processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    # Those that compile share the cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max((os.cpu_count() or 1) // max(num_processes, 1), 1)))
    suite = None
    if "tests" not in arguments.skip:
        log = arguments.results / TESTS_FILE
        suite = SuiteRun(arguments.device, log, arguments.test_processes, arguments.tests)
    tests_end = time.monotonic() + arguments.test_seconds

    def finish_tests(end: float) -> None:
        if suite is not None and results.tests is None:
            results.keep_tests(suite.wait(min(end, tests_end)))

    where = (arguments.size, arguments.device, str(arguments.results / LOG_FILE))
    try:
        if num_processes:
            measure_lines(lines, where, deadline, num_processes, results.keep, finish_tests)
        else:
            finish_tests(deadline)
            measure_lines_here(lines, where, deadline, results.keep)
    finally:
        if suite is not None:
            suite.end()
    print(results.table())
    return int(results.failed)


if __name__ == "__main__":
    raise SystemExit(run())
