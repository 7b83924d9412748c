"""What a command says when it cannot go on, and where."""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Iterator
from typing import TextIO


# What a user can do something about: another argument or file, a package, memory, room on a disk. What is none of
# these is a fault of this package, of which a traceback tells more.
TOLD = (
    ValueError,
    OSError,
    # torch's, for what a machine lacks.
    RuntimeError,
    MemoryError,
    OverflowError,
    ImportError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    subprocess.SubprocessError,
)


def is_told(error: Exception) -> bool:
    """Whether one line says enough of an error."""
    from safetensors import SafetensorError

    # Libraries in Rust raise plain exceptions for what they cannot read or write.
    return isinstance(error, (*TOLD, SafetensorError)) or type(error) is Exception


def describe(error: Exception) -> str:
    """An error in one line; what has no words is named."""
    return " ".join(str(error).split()) or type(error).__name__


def report(line: str, is_verbose: bool = False) -> None:
    """One line on stderr, and before it where the error was raised if that is asked for."""
    # Nobody is left to be told of a stderr that takes nothing.
    with contextlib.suppress(OSError):
        if is_verbose:
            traceback.print_exc()
        print(line, file=sys.stderr, flush=True)


def discard_unwritten(stream: TextIO) -> bool:
    """Whether a stream takes no more; then what it still holds is dropped, as Python would fail on it at the end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return True
    return False


@contextlib.contextmanager
def open_stderr() -> Iterator[None]:
    """Within it there is a stderr: Python has none where it was closed, and the next file would take its number."""
    if sys.stderr is not None:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = None


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sits at a stream, which may be closed."""
    return stream is not None and not stream.closed and stream.isatty()
