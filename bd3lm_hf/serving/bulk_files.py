"""The files of a bulk run: rows to be written, those that are, and what wrote them, so that a run can go on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.replacing import write_text


try:
    import fcntl
except ImportError:
    fcntl = None


# What says of a folder which model it is; the Trainer's own files beside it do not.
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".gguf", ".pt", ".ckpt", ".model", ".txt", ".jinja", ".py")
# Bytes that are read at once.
AT_ONCE = 2**24
TRAINERS_OWN = ("trainer_state.json", "training_args.bin", "optimizer.", "scheduler.", "rng_state")


def read_rows(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a file, numbers from 0 and lines; a line without a character is none."""
    with open(path, "rb") as lines:
        yield from enumerate(line for line in lines if line.strip())


def digest_of_rows(path: str | Path, num_rows: int | None = None) -> tuple[int, str]:
    """How many rows a file has, at most `num_rows`, and the SHA-256 of these."""
    digest, count = hashlib.sha256(), 0
    for index, line in read_rows(path):
        if index == num_rows:
            break
        digest.update(line.strip() + b"\n")
        count += 1
    return count, digest.hexdigest()


def digest_of_model(name_or_path: str | Path) -> str:
    """
    What tells a model and its tokenizer from others: the SHA-256 of its files, or of the Hub its name and commit.

    Args:
        name_or_path: Folder or file, or Hub id.
    """
    path = Path(name_or_path)
    if not path.exists():
        return f"{name_or_path}@{_commit_of(str(name_or_path))}"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in MODEL_SUFFIXES and not file.name.startswith(TRAINERS_OWN) and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as content:
                while part := content.read(AT_ONCE):
                    digest.update(part)
    return digest.hexdigest()


def _commit_of(name: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(name, "config.json")
    except OSError:
        # That of an adapter.
        file = cached_file(name, "adapter_config.json")
    return extract_commit_hash(file, None)


@dataclass
class BulkOutput:
    """
    The results of a run, a line each, in the order in which they came; within `with` they can be added to.

    What wrote them is in a file beside it, whose name ends in `.run.json`. A line that an interruption tore is taken
    away, and its row is written again. So is a row whose line somebody took away.

    Args:
        path: the file of results.
        data: the file of rows; more rows may be put at its end later.
        made_by: what the results depend on besides the rows, as JSON has it.
        overwrite: begin anew, whatever is there.

    Raises:
        ValueError: something else wrote what is there, or it is none of this.
        OSError: another run writes it at this moment.
    """

    path: Path
    data: Path
    made_by: dict[str, Any]
    overwrite: bool = False
    done: set[int] = field(default_factory=set, init=False)
    num_rows: int = field(default=0, init=False)
    num_errors: int = field(default=0, init=False)

    def __post_init__(self):
        self.path, self.data = Path(self.path), Path(self.data)
        self.record = self.path.with_name(self.path.name + ".run.json")
        self._file: Any = None

    def __enter__(self) -> "BulkOutput":
        # Not emptied before it is known whose it is.
        self._file = open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0)
        try:
            self._lock()
            if self.overwrite:
                self._file.truncate(0)
            self.num_rows, digest = digest_of_rows(self.data)
            if self._file.seek(0, os.SEEK_END):
                self._check_record()
                self._read_results()
            record = {"made_by": self.made_by, "rows": {"number": self.num_rows, "sha256": digest}}
            write_text(self.record, json.dumps(record, indent=2) + "\n")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The rows that have no result yet."""
        return ((index, line) for index, line in read_rows(self.data) if index not in self.done)

    def add(self, result: dict[str, Any]) -> bool:
        """Writes a result, whole or not at all; False for one whose row has a result already."""
        if result["index"] in self.done:
            return False
        line = memoryview(_encoded(result))
        while line:
            line = line[self._file.write(line) :]
        self._note(result)
        return True

    def _note(self, result: dict[str, Any]) -> None:
        self.done.add(result["index"])
        self.num_errors += "error" in result

    def _lock(self) -> None:
        if fcntl is not None:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            raise OSError(f"{self.path} is written by another run at this moment")

    def _check_record(self) -> None:
        """Whether what is there was made by the same model, with the same settings, of the same rows."""
        anew = "`--overwrite` begins anew"
        try:
            record = json.loads(self.record.read_bytes())
            made_by, rows = record["made_by"], record["rows"]
            number, digest = rows["number"], rows["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"`output` must be a new file or that of an earlier run, but {self.path} has no {self.record.name} "
                f"that tells which; {anew}."
            ) from None
        for name in sorted({*made_by, *self.made_by}):
            if made_by.get(name) != self.made_by.get(name):
                raise ValueError(
                    f"`{name}` must be {made_by.get(name)!r}, as for the rows that {self.path} holds, but got "
                    f"{self.made_by.get(name)!r}; {anew}."
                )
        if digest_of_rows(self.data, number) != (number, digest):
            raise ValueError(
                f"`data` must begin with the {number} rows of which {self.path} holds results, but {self.data} has "
                f"others; {anew}."
            )

    def _read_results(self) -> None:
        """Reads which rows are written, and takes a torn last line away."""
        self._file.seek(0)
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                self._take(number, line)
        self._file.truncate(end)
        self._file.seek(end)

    def _take(self, number: int, line: bytes) -> None:
        try:
            result = json.loads(line)
            index = result["index"]
            if not isinstance(index, int) or not 0 <= index < self.num_rows or index in self.done:
                raise ValueError(f"index {index!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`output` must hold a result of another row in each line, but line {number} of {self.path} is "
                f"{line[:80]!r} ({error})."
            ) from None
        self._note(result)


def _encoded(result: dict[str, Any]) -> bytes:
    try:
        return f"{json.dumps(result, ensure_ascii=False, allow_nan=False)}\n".encode()
    except UnicodeEncodeError:
        # Half a character, which JSON alone can say.
        return f"{json.dumps(result, allow_nan=False)}\n".encode()
