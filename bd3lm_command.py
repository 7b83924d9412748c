"""The command `bd3lm`. It stands beside the package, whose import takes seconds and may be interrupted as well."""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Run the command and return its exit code; see `bd3lm_hf.cli.main`."""
    before = signal.signal(signal.SIGINT, _leave)
    from bd3lm_hf.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _leave(*args: Any) -> None:
    # There is nothing to clean up, and C++ that is just being initialized ends the process if Python raises in it.
    print("bd3lm: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
