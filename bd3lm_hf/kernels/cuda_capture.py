"""Recording what a function launches on a GPU, by the rules that torch has for CUDA graphs."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


# What another thread launches on the stream meanwhile would be recorded as well.
_LOCK = threading.RLock()


@functools.cache
def side_stream(device: torch.device) -> Any:
    """The stream on which steps of a device are captured, and run before that: libraries get ready for a stream."""
    return torch.cuda.Stream(device)


def warm_up(function: Callable[[], None], device: torch.device) -> None:
    """Runs a function where it is to be captured, in the order of what the device does otherwise."""
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with _LOCK, torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)


def capture(function: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """
    Records what a function launches on the device; what is returned launches it again. Raises a RuntimeError where it
    does what can't be recorded, such as to wait.
    """
    graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
    # Around the other, which does not come back from the stream where recording fails. Other threads may go on.
    with _LOCK, torch.cuda.stream(stream):
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    return graph.replay


def new_pool() -> Any:
    """Memory that the graphs of one [`CapturedSteps`] share, since they never run at the same time."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def casting_anew() -> Iterator[None]:
    """Within it autocast keeps no weights that it has cast: they are gone after it, and a graph would read them."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
