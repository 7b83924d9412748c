"""
Runs Transformers' `ModelTesterMixin` on the models of this package: `python -m tests.conformance.run`.

The mixin ships with the source distribution of Transformers and not with the wheel: that of the installed version is
downloaded once and kept in the folder .cache beside this file. Other arguments go to pytest (`-k resize`, `-rs`).
"""

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import pytest


HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
TESTS_PACKAGE = "transformers_tests"
# The mixin imports these, and the source distribution holds neither. It needs no more of them than the names.
STAND_INS = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}
# Our own selection and our strictness about markers are not meant for a suite whose markers Transformers declares.
PYTEST_OPTIONS = ("-o", "addopts=", "-W", "ignore::pytest.PytestUnknownMarkWarning", "-p", "no:cacheprovider")


def download_source(transformers_version: str) -> Path:
    """The source distribution of this version, from the cache if it is there."""
    archive = CACHE / f"transformers-{transformers_version}.tar.gz"
    if not archive.exists():
        requirement = f"transformers=={transformers_version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", requirement]
        subprocess.run([*command, "--dest", str(CACHE)], check=True)
    return archive


def read_tests(source: Path) -> dict[str, str]:
    """The modules that lie directly in `tests/` of a source distribution, packed or unpacked: file name -> text."""
    if source.is_dir():
        return {path.name: path.read_text(encoding="utf-8") for path in (source / "tests").glob("*.py")}
    with tarfile.open(source) as archive:
        paths = {member: PurePosixPath(member.name) for member in archive if member.isfile()}
        return {
            path.name: archive.extractfile(member).read().decode("utf-8")
            for member, path in paths.items()
            if path.suffix == ".py" and path.parts[1:-1] == ("tests",)
        }


def write_tests_package(source: Path, folder: Path) -> None:
    """Writes the package `transformers_tests` into the folder."""
    modules = read_tests(source)
    if "test_modeling_common.py" not in modules:
        raise ValueError(f"`source` must be a source distribution of Transformers with its tests, but got {source}.")
    modules |= {path: f"class {name}:\n    pass\n" for path, name in STAND_INS.items()}
    for path, text in modules.items():
        target = folder / TESTS_PACKAGE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        (target.parent / "__init__.py").touch()


class Counts:
    """Pytest plugin that counts tests; a test is what the worst of its phases and subtests is."""

    severity = ("passed", "skipped", "failed")

    def __init__(self):
        self.outcomes = defaultdict(lambda: "passed")

    def pytest_runtest_logreport(self, report):
        self.outcomes[report.nodeid] = max(self.outcomes[report.nodeid], report.outcome, key=self.severity.index)

    def __str__(self):
        totals = {outcome: list(self.outcomes.values()).count(outcome) for outcome in self.severity}
        return "{passed} passed, {failed} failed, {skipped} skipped".format(**totals)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.run",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, help="source distribution of Transformers, packed or unpacked, in place of the download"
    )
    arguments, pytest_arguments = parser.parse_known_args()
    transformers_version = version("transformers")
    source = arguments.source or download_source(transformers_version)

    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        write_tests_package(source, Path(folder))
        sys.path.insert(0, folder)
        # By the environment, because some tests start pytest anew in a process of their own.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        os.environ["PYTEST_ADDOPTS"] = shlex.join(PYTEST_OPTIONS)
        # Nothing here is on the Hub.
        os.environ["HF_HUB_OFFLINE"] = "1"
        status = pytest.main(["-q", *pytest_arguments, str(HERE / "conformance_suite.py")], plugins=[counts])
    print(f"ModelTesterMixin of transformers {transformers_version}: {counts}")
    return status


if __name__ == "__main__":
    sys.exit(main())
