"""
The code of the documentation, and a reader who runs a page from top to bottom.

As a script, `python pages.py REPORT author|user PAGE...` runs pages that need a Hub, against the one that HF_ENDPOINT
names, in the working folder. The author has this package. The user has not, and runs what stands under headings that
say so. What either found is left in the file REPORT.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
# Blocks in these languages are no code.
DATA = {"bibtex", "text"}
# Commands that a page shows and no test runs, as patterns, and why.
NOT_RUN = {
    "source .venv/bin/activate": "the tests run in an environment of their own",
    "bd3lm train --data my_texts/ *": "needs the Hub; a test reads its arguments",
    "bd3lm serve bd3lm-demo": "serves until it is stopped; a test starts it, asks and interrupts it",
    "curl http://127.0.0.1:8000/*": "asks the server of that command; the page's Python asks one like it",
    "bd3lm serve bd3lm-demo --ray *": "needs Ray, and serves until it is stopped; slow tests start it",
    "bd3lm generate * --ray *": "needs Ray; a slow test runs it",
    "OPENAI_API_KEY=* lm_eval *": "asks a server; a test runs it",
    "bd3lm app --server *": "serves until it is stopped; the tests of the app visit the page",
    "bd3lm app bd3lm-demo": "serves until it is stopped; the tests of the app visit the page",
    "bd3lm convert kuleshov-group/bd3lm-owt-block_size4 bd3lm-owt-block4 --tokenizer gpt2": "needs the Hub; the page "
    "on published checkpoints has the same, and is run against a Hub of the tests",
    ".venv/bin/python -m pytest *": "runs tests, which run by themselves",
    "python -m benchmarks.*": "measures, for minutes or hours on a quiet machine",
}
# What the commands of the pages are given in the place of their sizes.
TINY = {
    "--vocab_size": ["300"],
    "--length": ["32"],
    "--hidden_size": ["32"],
    "--num_hidden_layers": ["1"],
    "--max_steps": ["4"],
    "--eval_steps": ["2"],
    "--save_steps": ["2"],
    "--logging_steps": ["2"],
    "--max_eval_sequences": ["8"],
    "--max_new_tokens": ["8"],
    "--block_size_schedule": ["0:32", "2:4"],
}


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    heading: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]

    @property
    def needs_no_package(self) -> bool:
        return "without this package" in self.heading.lower()


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    blocks, heading, opened = [], "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith("#"):
            heading = line.lstrip("# ")
        fence = re.match(r" *```(.*)", line)
        if fence and opened is None:
            opened = Block(page, number + 1, heading, fence[1].strip(), "")
        elif fence:
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened.text += line + "\n"
    assert opened is None, f"{page.name}:{opened.line}: a block without an end"
    return blocks


def commands(page: Path) -> list[list[str]]:
    """The words of each `bd3lm` command of a page."""
    lines = [shlex.split(line) for block in read_blocks(page) if block.language == "bash" for line in block.commands]
    return [words[1:] for words in lines if words[:1] == ["bd3lm"]]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if fnmatchcase(command, pattern)), None)


def run_block(block: Block, names: dict[str, Any]) -> None:
    # Errors tell the line of the page.
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)


def tiny(words: list[str]) -> list[str]:
    """A command at a tiny size: only flags that it has are changed."""
    changed, values = [], iter(words)
    flag = None
    for word in values:
        if word.startswith("--"):
            flag = word
            changed += [word, *TINY.get(word, [])]
        elif flag == "--block_size" and word == "128":
            changed.append("32")
        elif flag not in TINY:
            changed.append(word)
    return changed


def run_command(command: str) -> None:
    """Runs a line of a shell, at a tiny size; `bd3lm` and the harness in this process, which spares imports."""
    match shlex.split(command):
        case ["bd3lm", *words]:
            from bd3lm_hf.cli import main

            assert main(tiny(words)) in (0, None), command
        case ["python", "-m", "bd3lm_hf.evaluation.harness", *words]:
            from lm_eval.api.registry import model_registry

            # The module registers its model, once by this name and once as `__main__`.
            known = {name: target for name, target in model_registry.items() if name != "bd3lm"}
            argv = mock.patch.object(sys, "argv", ["bd3lm_hf.evaluation.harness", *words])
            with argv, mock.patch.object(model_registry, "_objs", known):
                runpy.run_module("bd3lm_hf.evaluation.harness", run_name="__main__")
        case ["accelerate", *words]:
            code = "from accelerate.commands.accelerate_cli import main; main()"
            subprocess.run([sys.executable, "-c", code, *tiny(words)], check=True, stdin=subprocess.DEVNULL)
        case ["make", target]:
            # What the targets do runs by itself.
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        case _:
            raise AssertionError(f"{command!r} is not run, and NOT_RUN gives no reason for it")


def run_page(
    page: Path,
    choose: Callable[[Block], bool] = lambda block: True,
    before: Callable[[str], None] = lambda command: None,
) -> tuple[dict[str, Any], str]:
    """
    Runs a page from top to bottom in the working folder: the blocks that `choose` takes, with a call of `before` ahead
    of each command.

    Returns:
        The names that its Python has in the end, and what was printed.

    Raises:
        AssertionError: there is a block that is neither run nor data nor in `NOT_RUN`.
    """
    names, printed = {"__name__": page.stem}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in filter(choose, read_blocks(page)):
            if block.language == "python":
                run_block(block, names)
            elif block.language == "bash":
                for command in block.commands:
                    if reason_not_to_run(command) is None:
                        before(command)
                        run_command(command)
            else:
                assert block.language in DATA, f"{page.name}:{block.line}: what is a block of {block.language!r}?"
    return names, printed.getvalue()


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    import torch

    model.eval()
    with torch.no_grad():
        return {"logits": model(**inputs).logits, "text": model.generate(**inputs, max_new_tokens=8, seed=0)}


def run_hub_pages(report: str, role: str, *pages: str) -> None:
    import torch

    results = {}
    for name in pages:
        page = DOCS / f"{name}.md"
        names, printed = run_page(page, lambda block: block.needs_no_package == (role == "user"))
        results[name] = {"printed": printed}
        if role == "author" and name == "peft":
            inputs = dict(names["tokenizer"]("7 and 1 are ", return_tensors="pt"))
            torch.save(outputs(names["adapted"], inputs), "expected.pt")
        elif name == "peft":
            from transformers import AutoModelForMaskedLM

            expected, inputs = torch.load("expected.pt"), dict(names["inputs"])
            bare = AutoModelForMaskedLM.from_pretrained("user/bd3lm-owt-block4", trust_remote_code=True)
            again = AutoModelForMaskedLM.from_pretrained("my-merged-model", trust_remote_code=True)
            for key, model in (("merged", names["merged"]), ("bare", bare), ("again", again)):
                found = outputs(model, inputs)
                results[name][key] = (found["logits"] - expected["logits"]).abs().max().item()
            results[name]["same_text"] = torch.equal(names["text"], expected["text"])
    Path(report).write_text(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[2] == "user":
        sys.modules["bd3lm_hf"] = None  # import bd3lm_hf raises ImportError from here on
    run_hub_pages(*sys.argv[1:])
