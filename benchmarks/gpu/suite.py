"""The test suite on the device, beside the preparation of the other lines."""

import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


# Of the summary that pytest ends with.
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


class SuiteRun:
    """
    Starts `pytest --device DEVICE`.

    Args:
        device: "cpu" or "cuda".
        log: the file that it writes to.
        num_processes: of pytest-xdist, where that is installed.
        paths: test files; by default all that run on the device.
    """

    def __init__(self, device: str, log: Path, num_processes: int, paths: list[str]):
        self.log, self.began, self.result = log, time.monotonic(), None
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--device", device, *paths]
        if num_processes > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(num_processes), "--dist", "loadfile"]
        with log.open("w", encoding="utf-8") as file:
            # A session of its own, so that all its processes can be ended together.
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self, deadline: float) -> dict:
        """Waits for the end, by `time.monotonic` until a deadline at most; what came of it."""
        if self.result is not None:
            return self.result
        is_over = False
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.1))
            is_over = True
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.end()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        counts = summary_of(text)
        state = ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "no summary"
        has_failed = is_over and self.process.returncode not in (0, 5)
        if has_failed or counts.get("failed") or counts.get("error") or counts.get("errors"):
            state = f"fails: {state} (exit status {self.process.returncode})"
        elif not is_over:
            state = f"{state}, then no time left"
        self.result = {"state": state, **counts, "seconds": time.monotonic() - self.began}
        return self.result

    def end(self) -> None:
        """Ends it, whatever it is at."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def summary_of(text: str) -> dict[str, int]:
    """Numbers of tests by what came of them, of the last line of a log that has any."""
    for line in reversed(text.splitlines()):
        counts = {kind: int(number) for number, kind in COUNT.findall(line)}
        if counts:
            return counts
    return {}
