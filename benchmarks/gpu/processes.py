"""A process for each line: several compile at the same time, then each measures with nothing else at work."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

from .lines import Line


NO_TIME = "not run: no time left"
# Kept for measuring a line that is ready, and for what ends a run.
SECONDS_TO_MEASURE, SECONDS_TO_END = 6.0, 5.0


def fault(error: BaseException) -> str:
    """How a line failed, on one line."""
    return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def serve(connection, line: Line, size_name: str, device: str, log: str) -> None:
    """What the process of a line does: prepares, says that it is ready, waits for its turn, measures."""
    with open(log, "a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        from .measuring import measure, prepare
        from .networks import SIZES

        size = SIZES[size_name]
        prepared = prepare(line, size, device)
        connection.send("ready")
        connection.recv()
        connection.send(asdict(measure(line, prepared, size, device)))
    except Exception as error:
        print(f"{line.key}:", flush=True)
        traceback.print_exc()
        connection.send(fault(error))


class Worker:
    """
    The process of a line.

    Args:
        line: what it measures.
        start: function of the same arguments as [`serve`] that the process runs.
    """

    def __init__(self, line: Line, arguments: tuple, start: Callable = serve):
        context = multiprocessing.get_context("spawn")
        self.line, self.began = line, time.monotonic()
        self.connection, other = context.Pipe()
        self.process = context.Process(target=start, args=(other, line, *arguments))
        self.process.start()
        other.close()

    def answer(self, seconds: float) -> dict | str | None:
        """What the process says within so many seconds: "ready", figures, or how it failed; None: nothing yet."""
        if not self.connection.poll(max(seconds, 0.0)):
            return None
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(5.0)
            return f"fails: its process ended with status {self.process.exitcode}"

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def measure_lines(
    lines: Iterable[Line],
    arguments: tuple[str, str, str],
    deadline: float,
    num_processes: int,
    keep: Callable[[Line, dict | str, float], None],
    before_measuring: Callable[[float], None] = lambda deadline: None,
    start: Callable = serve,
) -> None:
    """
    Prepares lines, so many at a time, and then measures those that are ready, one after the other.

    Args:
        lines: in the order of what is to be begun first.
        arguments: the name of the size, the device, and the file that processes write to.
        deadline: by `time.monotonic`, of all of it.
        num_processes: that prepare at the same time.
        keep: is given each line with its figures, or how it failed, and the seconds that it took.
        before_measuring: called with a deadline of its own when all is prepared: after it the device must be free.
        start: see [`Worker`].
    """
    order = list(lines)
    waiting, preparing, ready = [*order], [], []
    try:
        while waiting or preparing:
            left = deadline - SECONDS_TO_END - SECONDS_TO_MEASURE * (len(ready) + 1) - time.monotonic()
            if left <= 0:
                break
            while waiting and len(preparing) < num_processes:
                preparing.append(Worker(waiting.pop(0), arguments, start))
            wait([worker.connection for worker in preparing], timeout=min(left, 1.0))
            for worker in [worker for worker in preparing if worker.connection.poll(0)]:
                preparing.remove(worker)
                answer = worker.answer(0)
                if answer == "ready":
                    ready.append(worker)
                else:
                    keep(worker.line, answer, time.monotonic() - worker.began)
                    worker.end()
        for worker in preparing:
            keep(worker.line, f"{NO_TIME}, after preparing", time.monotonic() - worker.began)
            worker.end()
        preparing = []
        for line in waiting:
            keep(line, NO_TIME, 0.0)
        before_measuring(deadline - SECONDS_TO_END - SECONDS_TO_MEASURE * len(ready))
        # What matters most is measured first, whatever took longest to prepare.
        ready.sort(key=lambda worker: order.index(worker.line))
        while ready:
            worker = ready.pop(0)
            preparing = [worker]
            keep(worker.line, measured_by(worker, deadline - SECONDS_TO_END), time.monotonic() - worker.began)
            worker.end()
    finally:
        for worker in preparing + ready:
            worker.end()


def measured_by(worker: Worker, deadline: float) -> dict | str:
    """The figures of a line whose process is ready, or how it failed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return f"{NO_TIME} to measure"
    try:
        worker.connection.send("measure")
    except OSError:
        return worker.answer(0) or "fails: its process ended"
    return worker.answer(seconds) or f"{NO_TIME}, after {seconds:.0f} s of measuring"


def measure_lines_here(
    lines: Iterable[Line],
    arguments: tuple[str, str, str],
    deadline: float,
    keep: Callable[[Line, dict | str, float], None],
) -> None:
    """The same in this process, one line after the other."""
    from .measuring import figures_of
    from .networks import SIZES

    size_name, device, log = arguments
    for line in lines:
        start = time.monotonic()
        if start > deadline:
            figures: dict | str = NO_TIME
        else:
            try:
                figures = figures_of(line, SIZES[size_name], device)
            except Exception as error:
                figures = fault(error)
                with Path(log).open("a", encoding="utf-8") as file:
                    print(f"{line.key}:\n{traceback.format_exc()}", file=file)
        keep(line, figures, time.monotonic() - start)
