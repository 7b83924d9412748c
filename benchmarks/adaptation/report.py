"""What docs/results.md says of adaptation, from the JSON in `benchmarks/adaptation/results/`."""

import json
import statistics
from pathlib import Path
from typing import Any

from . import arms, demo
from .workbench import BLOCK_SIZE, mean, standard_error


RESULTS = Path(__file__).parent / "results"
# As for the other sections: so many standard errors from 0, with one sign in all seeds.
ENOUGH_ERRORS = 2


def sections(results: Path = RESULTS) -> list[str]:
    """The comparison of recipes, then each demonstration that has run, as Markdown."""
    parts = []
    comparison = results / "arms.json"
    if comparison.is_file():
        parts.append(recipes(json.loads(comparison.read_text(encoding="utf-8"))))
    for path in sorted(results.glob("demo.*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        parts.append(
            f"## SmolLM2-135M-Instruct at block size {BLOCK_SIZE}\n\n`make adapt-demo`. {demo.section(document)}"
        )
    return parts


def recipes(document: dict[str, Any]) -> str:
    """The arms, and which of them differ from the baseline."""
    seeds = ", ".join(next(iter(document["runs"].values())))
    return "\n\n".join(
        [
            "## From an autoregressive model: which recipe costs least",
            f"`python -m benchmarks.adaptation arms`: SmolLM2-135M-Instruct to block size {BLOCK_SIZE}, "
            f"{document['num_tokens']:,} tokens of the Python standard library a run; seeds {seeds}; "
            f"{document['machine']}. The baseline keeps the source's shift, trains at block size {BLOCK_SIZE} from "
            "the start, masks each text once, and weighs the loss as the bound does; each other arm changes one of "
            "these.",
            arms.table(document),
            " ".join(verdict(document, name) for name in document["runs"] if name != "baseline"),
        ]
    )


def verdict(document: dict[str, Any], name: str) -> str:
    """Whether an arm differs from the baseline outside the errors."""
    values = arms.differences(document, name)
    has_one_sign = min(values) > 0 or max(values) < 0
    if not has_one_sign or abs(statistics.mean(values)) < ENOUGH_ERRORS * standard_error(values):
        return f"{name.capitalize()}: no difference outside the errors."
    return f"{name.capitalize()}: {'worse' if values[0] > 0 else 'better'}, by {mean(values)} nats per token."
