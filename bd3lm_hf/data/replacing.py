"""Files and folders are written beside their place and moved into it: an interruption leaves the old or the new."""

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path


# Of `renameat2`: names are relative to the working folder, and both are exchanged.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What says that a folder is a model.
LOADED_FIRST = ("config.json", "adapter_config.json")


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """
    Within it a file is written under another name, of the same suffix; then it takes the place of `path`.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    # Devices and pipes, such as /dev/stdout, are written to; a link stays one.
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    new = _beside(path)
    try:
        yield new
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """As `Path.write_text` in UTF-8; an interruption leaves the old file or the new."""
    with replaced_file(path) as new:
        new.write_text(text, encoding="utf-8")


def check_folder(name: str, path: str | Path, overwrite: bool = False, what: Iterable[str] = ("*",)) -> None:
    """
    Whether a folder can be written without loss.

    Args:
        name: Of the argument, for the error.
        path: Where.
        overwrite: Whether what is there may go.
        what: Patterns of names whose files must not be there.

    Raises:
        ValueError: it is a file, or holds something of that, and nobody said that it may go.
    """
    path = Path(path)
    parent = next(parent for parent in path.resolve().parents if parent.exists())
    if not parent.is_dir():
        raise ValueError(f"`{name}` must be in a folder, but {parent} is a file.")
    if overwrite or not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"`{name}` must be a folder, but {path} is a file; `overwrite` (`--overwrite`) replaces it.")
    held = sorted(item.name for item in path.iterdir() if _matches(item.name, what))
    if held:
        raise ValueError(
            f"`{name}` must be a new or an empty folder, but {path} holds {held[0]}"
            f"{f' and {len(held) - 1} more' if held[1:] else ''}; `overwrite` (`--overwrite`) replaces what is there."
        )


@contextlib.contextmanager
def replaced_folder(
    name: str, path: str | Path, *, overwrite: bool = False, stale: Iterable[str] = ()
) -> Iterator[Path]:
    """
    Within it a folder is written under another name; then it takes the place of `path`, in one step where the
    operating system has it. What else lay in `path` stays there.

    Where the folder itself cannot be moved, since it is a mounted one or the one that this process works in, the new
    files are moved into it one by one, the configuration last, without which nothing is loaded.

    Args:
        name: Of the argument, for the error.
        path: The folder; one that is missing is made.
        overwrite: Whether it may be a file, or hold something.
        stale: Patterns of names at its top that go, whether or not something new has the name.

    Raises:
        ValueError: as [`check_folder`].
        OSError: it cannot be written there.
    """
    check_folder(name, path, overwrite)
    # A link stays one.
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    stays = path.is_dir() and (
        os.path.ismount(path) or Path.cwd().is_relative_to(path) or not os.access(path.parent, os.W_OK)
    )
    new = _beside(path / path.name if stays else path)
    new.mkdir()
    try:
        yield new
        if stays:
            move_into(new, path, stale)
            return
        if path.is_dir():
            shutil.copymode(path, new)
            _bring_over(path, new, stale)
        # Another process may have written it meanwhile.
        check_folder(name, path, overwrite)
        _put_in_place(new, path)
    finally:
        # The new one, if something went wrong, otherwise the old one.
        _remove(new)


def move_into(new: Path, path: Path, stale: Iterable[str]) -> None:
    """Moves what is in a folder `new` into `path` and takes away what is stale there; the configuration comes last."""
    names = sorted((item.name for item in new.iterdir()), key=lambda name: (name in LOADED_FIRST, name))
    for name in LOADED_FIRST:
        if name in names or _matches(name, stale):
            (path / name).unlink(missing_ok=True)
    for item in list(path.iterdir()):
        if item != new and item.name not in names and _matches(item.name, stale):
            _remove(item)
    for name in names:
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
        os.replace(new / name, path / name)
    _remove(new)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _bring_over(old: Path, new: Path, stale: Iterable[str]) -> None:
    """What lies in `old` and is neither stale nor there anew, under a second name: a link costs nothing."""
    for item in old.iterdir():
        if _matches(item.name, stale) or os.path.lexists(new / item.name):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, new / item.name)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _put_in_place(new: Path, path: Path) -> None:
    """`new` gets the name `path`, and what had that name, if there is something, gets that of `new`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if os.name == "nt" and path.exists():
            path.rmdir()
        os.rename(new, path)
        return
    if _exchange(new, path):
        return
    old = _beside(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    os.rename(old, new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step, or returns False: not every operating system and file system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    names = os.fsencode(first), os.fsencode(second)
    return renameat2 is not None and renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
