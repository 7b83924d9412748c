"""Measurements whose tables stand in `docs/benchmarks.md`; each runs by one command from the root of the checkout."""
