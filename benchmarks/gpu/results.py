"""What a run leaves in its folder: a line of JSON after each measurement, and a table of all."""

import json
from collections.abc import Sequence
from pathlib import Path

from .lines import Line


LINES_FILE, TABLE_FILE, LOG_FILE, TESTS_FILE = "lines.jsonl", "table.md", "log.txt", "tests.txt"
HEADER = [
    "part", "network", "model", "tokens/s", "x autoregressive", "x paper", "MFU", "peak, GiB", "launches",
    "synchronisations", "forwards a token", "seconds",
]  # fmt: skip


class Results:
    """
    Writes results as they come.

    Args:
        folder: made if it is not there; what an earlier run left there is replaced.
        lines: all that are to be measured, in the order of the table.
        about: where they are measured, in a sentence.
    """

    def __init__(self, folder: Path, lines: Sequence[Line], about: dict):
        self.folder, self.lines, self.about = folder, list(lines), about
        self.found: dict[tuple, dict] = {}
        self.tests: dict | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LINES_FILE, TABLE_FILE, LOG_FILE, TESTS_FILE):
            (folder / name).unlink(missing_ok=True)
        self._append({"about": about})

    def keep(self, line: Line, figures: dict | str, seconds: float) -> None:
        """Adds a line: its figures, or in words why there are none."""
        part, network, name = line.key
        found = figures if isinstance(figures, dict) else {"state": figures}
        self.found[line.key] = {"part": part, "network": network, "model": name, **found, "seconds": seconds}
        self._append(self.found[line.key])
        shown = figures if isinstance(figures, str) else f"{figures['tokens_per_second']:.0f} tokens/s"
        print(f"{part}, {network}, {name}: {shown} ({seconds:.0f} s)", flush=True)

    def keep_tests(self, tests: dict) -> None:
        """Adds what came of the test suite."""
        self.tests = tests
        self._append({"part": "tests", **tests})
        print(f"tests: {tests['state']} ({tests['seconds']:.0f} s)", flush=True)

    @property
    def failed(self) -> bool:
        """Whether a line, or a test, failed: not what there was no time for."""
        states = [each.get("state", "") for each in (*self.found.values(), self.tests or {})]
        return any(state.startswith("fails") for state in states)

    def _append(self, value: dict) -> None:
        with (self.folder / LINES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
        (self.folder / TABLE_FILE).write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """The Markdown page."""
        lines = sorted(self.lines, key=lambda line: (line.part != "training", line.network != "published"))
        rows = [self._row(line) for line in lines if line.key in self.found]
        text = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows))
        tests = "" if self.tests is None else f"\nTests on the device: {self.tests['state']}.\n"
        return f"{self.about['sentence']}\n\n{text}\n{tests}"

    def _row(self, line: Line) -> list[str]:
        found = self.found[line.key]
        seconds = f"{found['seconds']:.0f}"
        if "state" in found:
            state = found["state"].replace("|", "\\|")
            return [*line.key, state, *[""] * (len(HEADER) - 5), seconds]
        return [
            *line.key,
            f"{found['tokens_per_second']:.0f}",
            self._ratio(line, "autoregressive"),
            self._ratio(line, "paper"),
            shown(found["mfu"], ".1%"),
            shown(found["peak_memory"], ".1f"),
            shown(found["launches"], ".0f"),
            shown(found["synchronizations"], ".1f"),
            shown(found["forwards_per_token"], ".2f"),
            seconds,
        ]

    def _ratio(self, line: Line, model: str) -> str:
        """Its speed, times that of another model's line that is like it; nothing where that is not known."""
        other = line.compared_with(self.lines, model)
        speed = self.found.get(None if other is None else other.key, {}).get("tokens_per_second")
        return "" if speed is None else f"{self.found[line.key]['tokens_per_second'] / speed:.2f}"


def shown(value: float | None, form: str) -> str:
    """A figure, or nothing where it is not known."""
    return "" if value is None else format(value, form)
