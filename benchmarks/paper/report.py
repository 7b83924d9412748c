"""Writes docs/results.md and its plots from the JSON of the experiments: `python -m benchmarks.paper.report`."""

import argparse
import json
from pathlib import Path

from ..adaptation import report as adaptation
from . import ablation, block_size_one, generation, intervals, length, likelihood, schedules
from .experiment import ENOUGH_ERRORS, RESULTS


EXPERIMENTS = {
    "likelihood": likelihood,
    "block_size_one": block_size_one,
    "intervals": intervals,
    "schedules": schedules,
    "ablation": ablation,
    "generation": generation,
    "length": length,
}
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
# Of several scales the page shows the largest; all stay in JSON.
SCALES = ("gpu", "cpu")


def documents(results: Path) -> dict[str, dict]:
    """What was written of each experiment that has run, at the largest scale."""
    found = {}
    for name in EXPERIMENTS:
        paths = [path for scale in SCALES if (path := results / f"{name}.{scale}.json").exists()]
        if paths:
            found[name] = json.loads(paths[0].read_text(encoding="utf-8"))
    return found


def page(found: dict[str, dict]) -> str:
    """docs/results.md."""
    parts = [
        f"""# The paper's findings, run again

What the block diffusion paper (arXiv 2503.09573) reports, at the scale of the machine at hand. Each section names the
command that ran; its figures and plots are made from the JSON in `benchmarks/paper/results/` by `python -m
benchmarks.paper.report`, this page included. `±` is one standard error over seeds. Arms share the seeds: equal seeds
meet the same text in the same order, and the block diffusion models go on from the same base: the paper continues
masked diffusion models, these continue one of block size 1, since small models under masked diffusion stay on a
plateau first, some seeds much longer than others. Differences are taken seed by seed, and count if they are
{ENOUGH_ERRORS} standard errors from 0 with one sign in all seeds.

`--data FILE` trains on a text of yours, and `--scale gpu` on models of about 40 million parameters. Models are kept in
`--output_dir`: experiments share them, and a command that was killed goes on from what is done."""
    ]
    for name, document in found.items():
        parts.append(
            f"## {EXPERIMENTS[name].TITLE}\n\n{_origin(name, document)}\n\n{EXPERIMENTS[name].section(document)}"
        )
        parts[-1] += f"\n\n![{EXPERIMENTS[name].TITLE}](results/{name}.png)"
    missing = [f"`python -m benchmarks.paper.{name}`" for name in EXPERIMENTS if name not in found]
    if missing:
        parts.append(f"## Not run yet\n\nNo results stand here of {', '.join(missing)}.")
    return "\n\n".join([*parts, *adaptation.sections()]) + "\n"


def _origin(name: str, document: dict) -> str:
    settings, scale = document["settings"], document["scale"]
    command = f"python -m benchmarks.paper.{name}" + ("" if scale == "cpu" else f" --scale {scale}")
    if not document["data"].startswith("the Python standard library"):
        command += " --data FILE"
    versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
    base_steps, steps = settings["num_base_steps"], settings["num_steps"]
    tokens = (base_steps + steps) * settings["batch_size"] * settings["length"]
    network = f"{settings['num_layers']} layers, {settings['hidden_size']} wide"
    batches = f"{base_steps} + {steps} steps of {settings['batch_size']} sequences of {settings['length']} tokens"
    return (
        f"`{command}`: {document['data']}; networks of {network}; {batches} ({tokens:,} in all); seeds "
        f"{', '.join(map(str, document['seeds']))}; {document['seconds'] / 60:.0f} minutes of one run at a time, with "
        f"the models that it shares with other sections; {document['machine']}; {versions}."
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="where the page is written; plots go to a folder beside it"
    )
    arguments = parser.parse_args(argv)
    found = documents(arguments.results)
    plots = arguments.page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    for name, document in found.items():
        EXPERIMENTS[name].plot(document, plots / f"{name}.png")
    arguments.page.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
