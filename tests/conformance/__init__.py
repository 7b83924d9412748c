"""The tests that Transformers runs on its own models, run on these; see docs/conformance.md."""
