"""One run at a time writes into a folder, and knows which of the checkpoints there are its own."""

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging


try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None

logger = logging.get_logger(__name__)

# Holds the identity of the run that was started last, and is locked while one is going on.
RUN_FILE = "training_run.json"
# Folder -> the thread that writes there, and the descriptor of the run file by which it holds the lock.
_HELD: dict[str, tuple[int, int]] = {}


@dataclass(frozen=True)
class Run:
    """
    A run of training, from its first step, or from the checkpoint that it goes on from, to its end.

    Attributes:
        id: None where none is known, as in a folder of an earlier version.
        ancestors: The runs that it went on from, and the last step of each whose checkpoint is its own, too. An id of
            "" is that of an earlier version's run.
    """

    id: str | None = None
    ancestors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def new(cls, parent: "Run | None" = None, step: int = 0) -> "Run":
        """A run of its own, or one that goes on from the checkpoint of `parent` at `step`."""
        if parent is None:
            return cls(uuid.uuid4().hex)
        ancestors = {name: min(last, step) for name, last in parent.ancestors.items()}
        return cls(uuid.uuid4().hex, {**ancestors, parent.id or "": step})

    @classmethod
    def of(cls, output_dir: str | Path) -> "Run":
        """The run that was started last in a folder; one that is like no other where the record can't be read."""
        path = Path(output_dir, RUN_FILE)
        if not path.is_file() or path.stat().st_size == 0:
            return cls()
        try:
            # A shorter record is written over a longer one, and cut off afterwards.
            return cls.from_record(json.loads(path.read_text(encoding="utf-8").partition("\n")[0]))
        except ValueError:
            logger.warning(f"{path} can't be read: no checkpoint is known to be of the run that was started last.")
            return cls("unknown")

    @classmethod
    def from_record(cls, record: Any) -> "Run":
        """
        Raises:
            ValueError: `record` is not what `asdict` makes of a run.
        """
        try:
            id, ancestors = record["id"], {str(name): int(step) for name, step in record["ancestors"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{record!r} is no record of a run") from error
        if not isinstance(id, str) and id is not None:
            raise ValueError(f"{record!r} is no record of a run")
        return cls(id, ancestors)

    def owns(self, writer: "Run", step: int) -> bool:
        """Whether this run goes on from the checkpoint that `writer` wrote at `step`."""
        is_first_here = self.id is None
        return is_first_here or writer.id == self.id or step <= self.ancestors.get(writer.id or "", -1)


def on_main_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns on the main process, and the error that it raises there, on all processes."""
    outcome = [None]
    if PartialState().is_main_process:
        try:
            outcome = [function(*args)]
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@contextlib.contextmanager
def sole_writer(output_dir: str | Path) -> Iterator[None]:
    """
    Within it no other run writes into `output_dir`. The lock is the operating system's and dies with its process, the
    main one of several. A thread may enter again.

    Raises:
        ValueError: another run writes there.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(_lock(Path(output_dir)))

        on_main_process(enter)
        yield


@contextlib.contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    key = str(output_dir.resolve())
    if key in _HELD and _HELD[key][0] == threading.get_ident():
        yield
        return
    is_new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / RUN_FILE
    descriptor = _locked_descriptor(path)
    _HELD[key] = threading.get_ident(), descriptor
    try:
        yield
    finally:
        del _HELD[key]
        with contextlib.suppress(OSError):
            # No run was started: nothing is left of the attempt.
            if os.fstat(descriptor).st_size == 0:
                path.unlink()
                if is_new:
                    output_dir.rmdir()
        os.close(descriptor)


def _locked_descriptor(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                raise OSError("this operating system has no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(
                "`output_dir` must be a folder that no other run writes into, but another run is going on in "
                f"{str(path.parent)!r}."
            ) from error
        except OSError as error:
            logger.warning(f"{path.parent} can't be locked ({error}): see to it that no other run writes there.")
            return descriptor
        # The other one, just before it let go, may have deleted the file that was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _let_go_in_child() -> None:
    """A child, such as a worker that loads data, would keep the lock after its parent's death."""
    for _, descriptor in _HELD.values():
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def record_run(output_dir: str | Path, run: Run) -> None:
    """Has `output_dir`, within [`sole_writer`], know `run` as the one that was started there last."""
    _, descriptor = _HELD[str(Path(output_dir).resolve())]
    record = b"" if run.id is None else json.dumps(asdict(run)).encode() + b"\n"
    # In place, since the lock is on this very file.
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, record)
    os.ftruncate(descriptor, len(record))


@contextlib.contextmanager
def announced_run(output_dir: str | Path) -> Iterator[None]:
    """
    Within it `output_dir` knows of a new run that is being prepared, for which the checkpoints there are not its own:
    should it be killed, none of them is taken for it. If it comes to an error before training, all is as it was.
    """
    before, announced = Run.of(output_dir), Run.new()
    on_main_process(record_run, output_dir, announced)
    try:
        yield
    except BaseException:
        if PartialState().is_main_process and Run.of(output_dir) == announced:
            record_run(output_dir, before)
        raise
