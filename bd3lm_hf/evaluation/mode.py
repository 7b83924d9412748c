"""The mode that a model is evaluated in."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """The model without dropout, and left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
