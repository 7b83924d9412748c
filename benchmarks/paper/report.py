"""Writes docs/results.md and its plots from the JSON of the experiments: `python -m benchmarks.paper.report`."""

import argparse
import json
from pathlib import Path

from ..adaptation import report as adaptation
from . import ablation, block_size_one, generation, intervals, length, likelihood, schedules
from .experiment import DATA_NAMES, ENOUGH_ERRORS, RESULTS
from .slices import SLICES, merged_documents


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


def documents(results: Path, scale: str) -> dict[str, dict]:
    """What was written at a scale of each experiment that has run, as a whole or in slices."""
    found = merged_documents(results, scale)
    for name in EXPERIMENTS:
        path = results / f"{name}.{scale}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in EXPERIMENTS if name in found}


def page(found: dict[str, dict], on_gpu: dict[str, dict] | None = None) -> str:
    """docs/results.md, of the documents at the scale "cpu" and of those at the scale "gpu"."""
    parts = [
        f"""# The paper's findings, run again

What the block diffusion paper (arXiv 2503.09573) reports, at the scale of the machine at hand. Each section names the
command that ran; its figures and plots are made from the JSON in `benchmarks/paper/results/` by `python -m
benchmarks.paper.report`, this page included. `±` is one standard error over seeds. Arms share the seeds: equal seeds
meet the same text in the same order, and the block diffusion models go on from the same base: the paper continues
masked diffusion models, these continue one of block size 1, since small models under masked diffusion stay on a
plateau first, some seeds much longer than others. Differences are taken seed by seed, and count if they are
{ENOUGH_ERRORS} standard errors from 0 with one sign in all seeds.

`--data FILE` trains on a text of yours, and `--scale gpu` models of about 40 million parameters: see
[further down](#at-40-million-parameters-on-a-gpu). Models are kept in `--output_dir`: experiments share them, and a
command that was killed goes on from what is done."""
    ]
    parts += [_section(name, document, "##") for name, document in found.items()]
    missing = [f"`python -m benchmarks.paper.{name}`" for name in EXPERIMENTS if name not in found]
    if missing:
        parts.append(f"## Not run yet\n\nNo results stand here of {', '.join(missing)}.")
    parts.append(_gpu_head(bool(on_gpu)))
    parts += [_section(name, document, "###", "_gpu") for name, document in (on_gpu or {}).items()]
    return "\n\n".join([*parts, *adaptation.sections()]) + "\n"


def _section(name: str, document: dict, heading: str, suffix: str = "") -> str:
    """One experiment; `suffix` is that of its plot's name."""
    title = EXPERIMENTS[name].TITLE
    text = f"{heading} {title}\n\n{_origin(name, document)}\n\n{EXPERIMENTS[name].section(document)}"
    if len(document["seeds"]) == 1:
        text += "\n\nOf **one seed** no errors are known: what is said of errors above says nothing yet."
    return f"{text}\n\n![{title}](results/{name}{suffix}.png)"


def _gpu_head(has_run: bool) -> str:
    """How the larger scale is run."""
    text = f"""## At 40 million parameters, on a GPU

```text
python -m benchmarks.paper --scale gpu --data packages --slice NAME --seed 0 --results FOLDER
```

runs one slice for one seed: it trains what it measures, and needs no other slice and no packages but torch,
Transformers and Accelerate. The slices are {", ".join(f"`{name}`" for name in SLICES)};
experiments that take several are put together by the report. From the operations of a step and the speed of a larger
network on an H200 a slice is reckoned to take six to seven and a half minutes. Nothing is trained or begun after
`--seconds` (450); what there was no time for says so, and the JSON holds what was done until then. `--data packages`
is the Python source of the standard library and of the installed packages, equal files once; `--torch_compile` and
`--no-torch_compile` say whether training is compiled, in place of the trainer. The JSON of all slices and seeds goes
into `benchmarks/paper/results/`, and the report puts it together."""
    return text if has_run else f"{text}\n\n**Not run** yet on a GPU. The tests run slices at a tiny size on a CPU."


def _origin(name: str, document: dict) -> str:
    settings, scale = document["settings"], document["scale"]
    command = f"python -m benchmarks.paper.{name}" + ("" if scale == "cpu" else f" --scale {scale}")
    if "slices" in document:
        command = f"python -m benchmarks.paper --scale {scale} --slice {' | '.join(document['slices'])}"
    sources = [source for source, text in DATA_NAMES.items() if document["data"].startswith(text)]
    if sources != ["builtin"]:
        command += f" --data {''.join(sources) or 'FILE'}"
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
    found, on_gpu = (documents(arguments.results, scale) for scale in ("cpu", "gpu"))
    plots = arguments.page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    for suffix, shown in (("", found), ("_gpu", on_gpu)):
        for name, document in shown.items():
            EXPERIMENTS[name].plot(document, plots / f"{name}{suffix}.png")
    arguments.page.write_text(page(found, on_gpu), encoding="utf-8")


if __name__ == "__main__":
    main()
