"""
The experiments in slices of minutes: `python -m benchmarks.paper --scale gpu --data packages --slice NAME --seed 0`.

A slice trains all that it measures, for one seed, and needs nothing of another one. It writes one JSON file, anew
after each training and measurement, so that one that is stopped keeps what it had. `python -m benchmarks.paper.report`
puts the slices of all seeds together.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from . import generation, intervals, length, likelihood
from .experiment import circumstances, device, experiment_parser
from .scales import SCALES, Scale
from .workbench import Arm, OutOfTime, Workbench, measurement_name, run_name, write_json


EXPERIMENTS = {"likelihood": likelihood, "generation": generation, "intervals": intervals, "length": length}
# Of each slice the experiments, or what of them (a function of their module), and which of their arms. The
# autoregressive model judges samples.
SLICES: dict[str, dict[str, tuple[str, ...]]] = {
    **{
        f"blocks-{size}": {"likelihood": ("autoregressive", size), "generation": (size,)}
        for size in ("1", "4", "16", "length")
    },
    **{
        f"intervals-{size}-{what}": {f"intervals.{what}": (size,)}
        for size in ("4", "16")
        for what in ("search", "fixed")
    },
    **{
        f"length-{size}-{what}": {f"length.{what}": (size,)} for size in ("1", "4", "16") for what in ("read", "write")
    },
}
SECONDS = 450.0


class NotMeasured(Exception):
    """No slice holds what this names."""


class MergedSlices:
    """
    A workbench that trains nothing: it knows what slices hold.

    Args:
        scale: that of the slices.
        entries: of all slices, by the names that [`Workbench`] gives them.
    """

    def __init__(self, scale: Scale, entries: dict[str, dict]):
        self.scale, self.entries = scale, entries

    def record(self, arm: Arm, seed: int) -> dict:
        """As `Workbench.record`; raises NotMeasured."""
        return self._entry(f"{run_name(arm, seed)}/record")

    def measured(self, arm: Arm, seed: int, name: str, measure) -> dict:
        """As `Workbench.measured`; raises NotMeasured."""
        return self._entry(f"{run_name(arm, seed)}/{measurement_name(self.scale, name)}")

    def _entry(self, name: str) -> dict:
        if name not in self.entries:
            raise NotMeasured(name)
        return self.entries[name]


def run_slice(description: str, argv: Sequence[str] | None = None) -> Path:
    """Runs one slice; returns the file that it wrote."""
    start = time.monotonic()
    parser = experiment_parser(description)
    parser.add_argument("--slice", choices=SLICES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="nothing is trained or begun after so many")
    arguments = parser.parse_args(argv)
    if device() != "cpu":
        # TF32 for what is not in bfloat16: likelihoods and samples.
        torch.set_float32_matmul_precision("high")
    scale, deadline = SCALES[arguments.scale], start + arguments.seconds
    bench = Workbench(scale, arguments.data, arguments.output_dir, device(), arguments.torch_compile, deadline)
    path = arguments.results / f"slice.{arguments.scale}.{arguments.slice}.seed{arguments.seed}.json"
    document = {"slice": arguments.slice, "seed": arguments.seed, **circumstances(bench, arguments)}
    document |= {"text": bench.folder.name, "entries": bench.entries, "experiments": {}}

    def keep() -> None:
        write_json(path, {**document, "seconds": time.monotonic() - start})

    bench.on_entry = keep
    for name, arms in SLICES[arguments.slice].items():
        try:
            experiment, _, function = name.partition(".")
            getattr(EXPERIMENTS[experiment], function or "measure")(bench, [arguments.seed], arms)
            state = "done"
        except OutOfTime as error:
            state = f"no time left for {error}"
        except Exception as error:
            state = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        document["experiments"][name] = state
        print(f"{name}: {state} ({time.monotonic() - start:.0f} s)", flush=True)
        keep()
    print(f"wrote {path}")
    return path


def merged_documents(results: Path, scale: str) -> dict[str, dict]:
    """
    The documents of results that the slices of a scale make, as `experiment.run` writes them, of each experiment that
    is complete for some seed: of its arms those that the slices hold, of seeds those that have all of these arms.

    Raises:
        ValueError: the slices are of several texts or sizes, so that they say nothing of each other.
    """
    paths = sorted(results.glob(f"slice.{scale}.*.json"))
    slices = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len({(each["text"], json.dumps(each["settings"])) for each in slices}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"`results` must hold slices of one text and one size, but got several in {names}.")
    if not slices:
        return {}
    settings = slices[0]["settings"]
    entries = {name: entry for each in reversed(slices) for name, entry in each["entries"].items()}
    bench = MergedSlices(Scale(**{**settings, "block_sizes": tuple(settings["block_sizes"])}), entries)
    seeds = sorted({each["seed"] for each in slices})
    found = {}
    for name, module in EXPERIMENTS.items():
        parts, complete = complete_parts(bench, module, seeds)
        used = [each for each in slices if name in experiments_of(each) and each["seed"] in complete]
        # Slices of others may have trained what this one would show.
        if used:
            document = {"experiment": name, **_common(used), "settings": settings, "seeds": complete}
            found[name] = {**document, "results": module.measure(bench, complete, parts)}
    return found


def experiments_of(document: dict) -> set[str]:
    """The experiments that a slice has something of."""
    return {name.partition(".")[0] for name in document["experiments"]}


def complete_parts(bench: MergedSlices, module, seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The arms of an experiment that were measured, and the seeds for which all of them were."""

    def is_complete(seed: int, parts: Sequence[str]) -> bool:
        try:
            module.measure(bench, [seed], parts)
        except NotMeasured:
            return False
        return True

    seeds_of = {part: [seed for seed in seeds if is_complete(seed, [part])] for part in module.arms(bench.scale)}
    most = max(map(len, seeds_of.values()))
    # Arms that fewer seeds have come in when these have caught up.
    parts = [part for part, complete in seeds_of.items() if most and len(complete) == most]
    return parts, [seed for seed in seeds if parts and is_complete(seed, parts)]


def _common(slices: Sequence[dict]) -> dict:
    """What documents say of how results were got, of several slices."""
    fields = {name: sorted({each[name] for each in slices}) for name in ("data", "machine", "slice")}
    versions = {
        package: "/".join(sorted({each["versions"][package] for each in slices})) for package in slices[0]["versions"]
    }
    return {
        "scale": slices[0]["scale"],
        "data": "; ".join(fields["data"]),
        "machine": "; ".join(fields["machine"]),
        "slices": fields["slice"],
        "versions": versions,
        "seconds": sum(each["seconds"] for each in slices),
    }


main = partial(run_slice, __doc__)
