"""
What makes a device fast, attached to the models' classes from outside.

Models compute the same without it, by plain torch: so does one that is loaded from the Hub where this package is not
installed. Nothing of it is ever stored on a model, so copies, pickles and checkpoints are plain.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from . import compiled, cpu, cuda_graphs
from .cpu_generation import MAX_PACKED_ROWS, MIN_PACKED_FORWARDS, using


__all__ = ["attach", "detach", "detached", "is_attached", "packed"]

_LOCK = threading.RLock()
# What was replaced: for each class and method the method itself, and what took its place.
_REPLACED: dict[tuple[type, str], tuple[Callable, Callable]] = {}


def attach(model: nn.Module | None = None) -> None:
    """
    Attaches the kernels; where they are attached already, nothing changes.

    Args:
        model: one whose classes came from the Hub; the kernels are attached to these classes, and so to all models of
            them. By default the classes are those of this package.

    Raises:
        ValueError: `model` has no class that kernels could be attached to, or its code is of another version.
    """
    with _LOCK:
        missing = [part for part in _replacements(model) if part[:2] not in _REPLACED]
        own = _classes(None)
        for cls, name, _ in missing:
            if cls is not own[cls.__name__] and _signature(cls, name) != _signature(own[cls.__name__], name):
                raise ValueError(
                    "`model` must be of the code of this version of bd3lm_hf, but got one whose "
                    f"`{cls.__name__}.{name}` takes {_signature(cls, name)}."
                )
        for cls, name, make in missing:
            original = cls.__dict__[name]
            _REPLACED[cls, name] = original, make(original)
            setattr(cls, name, _REPLACED[cls, name][1])


def detach(model: nn.Module | None = None) -> None:
    """
    Puts the plain methods back; where no kernels are attached, nothing changes.

    Args:
        model: as in [`attach`].

    Raises:
        ValueError: as in [`attach`].
    """
    with _LOCK:
        for cls, name, _ in _replacements(model):
            original, replacement = _REPLACED.pop((cls, name), (None, None))
            # What somebody else has put in its place since is theirs.
            if replacement is not None and cls.__dict__[name] is replacement:
                setattr(cls, name, original)


def is_attached(model: nn.Module | None = None) -> bool:
    """
    Whether the kernels are attached.

    Args:
        model: as in [`attach`].

    Raises:
        ValueError: as in [`attach`].
    """
    return all((cls, name) in _REPLACED for cls, name, _ in _replacements(model))


@contextmanager
def detached(model: nn.Module | None = None) -> Iterator[None]:
    """
    A context in which the kernels are detached, in all threads.

    Args:
        model: as in [`attach`].

    Raises:
        ValueError: as in [`attach`].
    """
    was_attached = is_attached(model)
    detach(model)
    try:
        yield
    finally:
        if was_attached:
            attach(model)


@contextmanager
def packed(model: nn.Module, num_rows: int) -> Iterator[None]:
    """
    A context in which a model on a CPU has the packed weights that each `generate` makes for itself, in this thread.

    Args:
        model: a block diffusion language model, whose weights stay as they are.
        num_rows: tokens of a usual forward.

    Raises:
        ValueError: as in [`attach`].
    """
    is_packed = is_attached(model) and model.device.type == "cpu"
    size = (min(num_rows, MAX_PACKED_ROWS), MIN_PACKED_FORWARDS)
    with using(cpu.pack_weights(model, _classes(model), *size) if is_packed else None):
        yield


def _replacements(model: nn.Module | None) -> Iterator[tuple[type, str, Callable]]:
    classes = _classes(model)
    yield from cpu.replacements(classes)
    yield from compiled.replacements(classes)
    yield from cuda_graphs.replacements(classes)


def _signature(cls: type, name: str) -> list[str]:
    """The names of what a method takes; empty where there is none."""
    return list(inspect.signature(cls.__dict__[name]).parameters) if name in cls.__dict__ else []


def _classes(model: nn.Module | None) -> dict[str, type]:
    """By name, the classes of a model, of its modules, and what they inherit from; by default this package's."""
    if model is None:
        from ..modeling import modeling_bd3lm

        roots = [kind for kind in vars(modeling_bd3lm).values() if isinstance(kind, type)]
    else:
        roots = [type(module) for module in model.modules()]
    classes = {cls.__name__: cls for root in dict.fromkeys(roots) for cls in reversed(root.__mro__)}
    if "BlockDiffusionLMMixin" not in classes and "BD3LMDecoderLayer" not in classes:
        raise ValueError(f"`model` must be a block diffusion language model, but got {type(model).__name__}.")
    return classes
