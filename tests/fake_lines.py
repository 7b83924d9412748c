"""What processes of lines do in tests of benchmarks/gpu: see `start`. It imports nothing that takes time."""

import os
import time
from pathlib import Path


FIGURES = {
    "tokens_per_second": 100.0,
    "mfu": None,
    "peak_memory": None,
    "launches": None,
    "synchronizations": None,
    "forwards_per_token": None,
    "kernels": [],
}


def note(log, line, what):
    with Path(log).open("a") as file:
        file.write(f"{line.note} {what} {time.monotonic()}\n")


def start(connection, line, size_name, device, log):
    """Does what the note of the line says, and writes down when it prepares and measures."""
    note(log, line, "prepares")
    if line.note == "fails":
        return connection.send("fails: ValueError: no such thing")
    if line.note == "dies":
        os._exit(3)
    if line.note == "hangs":
        time.sleep(600)
    time.sleep(0.2)
    note(log, line, "ready")
    connection.send("ready")
    connection.recv()
    note(log, line, "measures")
    if line.note == "dies late":
        os._exit(4)
    time.sleep(0.2)
    note(log, line, "over")
    connection.send(FIGURES)
