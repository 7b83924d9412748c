"""What the server tells Prometheus of itself."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .engine import Engine
from .requests import Ended, Failed, Request, Written


# Seconds.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
COUNTERS = {
    "forwards": "Forwards of the model, however many requests shared one.",
    "tokens": "Tokens that were written.",
    "row_forwards": "Forwards that requests took, each counted for itself.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that a slot held already.",
    "ended": "Requests that were answered.",
    "failed": "Requests that failed.",
    "cancelled": "Requests that were cancelled.",
    "refused": "Requests that found the queue full.",
}


class Metrics:
    """
    The metrics of an engine, in a registry of their own.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        options = {"buckets": BUCKETS, "registry": self.registry}
        self._first_block = Histogram("bd3lm_first_block_seconds", "Until the first block of a request.", **options)
        self._latency = Histogram("bd3lm_request_seconds", "Until a request was answered.", **options)
        self.registry.register(self)

    def watch(self, request: Request) -> None:
        """Measures how long a request takes, by its listener."""
        listener, is_first = request.listener, True

        def watched(event: Any) -> None:
            nonlocal is_first
            seconds = time.monotonic() - request.came
            if is_first and isinstance(event, (Written, Ended)):
                is_first = False
                self._first_block.observe(seconds)
            if isinstance(event, (Ended, Failed)):
                self._latency.observe(seconds)
            listener(event)

        request.listener = watched

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks for: counters and gauges of the engine."""
        counts, engine = self.engine.counts, self.engine
        for name, help_text in COUNTERS.items():
            yield CounterMetricFamily(f"bd3lm_{name}", help_text, value=getattr(counts, name))
        yield GaugeMetricFamily("bd3lm_queue_length", "Requests that wait for a slot.", value=engine.num_waiting)
        yield GaugeMetricFamily("bd3lm_slots_in_use", "Requests that have a slot.", value=engine.num_running)
        yield GaugeMetricFamily("bd3lm_slots", "Slots.", value=engine.limits.num_slots)
        yield GaugeMetricFamily(
            "bd3lm_tokens_per_forward",
            "Tokens that a forward wrote of a request, so far.",
            value=counts.tokens / max(counts.row_forwards, 1),
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self.registry)
