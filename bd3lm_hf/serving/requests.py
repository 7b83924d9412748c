"""What is asked of the engine, and what it tells of it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Began:
    """The request has a slot, and its arguments are good."""


@dataclass(frozen=True)
class Written:
    """Finished tokens, and their log-probabilities when they were revealed, if they were asked for."""

    token_ids: list[int]
    log_probabilities: list[float] | None = None


@dataclass(frozen=True)
class Draft:
    """The text after what is finished, as it is denoised: ids, the mask token's where nothing is revealed yet."""

    token_ids: list[int]


@dataclass(frozen=True)
class Ended:
    """
    The whole of what came of a request.

    Attributes:
        token_ids: new tokens; of a request that fills gaps the whole text.
        log_probabilities: of each of these when it was revealed (NaN where it was given), if they were asked for.
        num_forwards: forwards that wrote it.
        finish_reason: "stop" where a rule ended the text, "length" where it is as long as it may be.
    """

    token_ids: list[int]
    log_probabilities: list[float] | None
    num_forwards: int
    finish_reason: str


@dataclass(frozen=True)
class Failed:
    """Why there will be no text. `is_refused`: what was asked for can't be done, so that asking again is of no use."""

    error: BaseException
    is_refused: bool


class Stopped(RuntimeError):
    """The engine ended before the request."""


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Request:
    """
    One text to be written.

    Attributes:
        input_ids: the prompt, BOS included.
        max_new_tokens: at most so many new tokens; 0 with `infill`.
        listener: is called with each event, in the engine's thread, which it must not hold up.
        options: arguments of `generate` but for the length, among them a `seed`.
        wants_reveal: tell log-probabilities.
        wants_drafts: tell of each step.
        adapter: the name of the adapter that it is written with, None for the model itself.
    """

    input_ids: list[int]
    max_new_tokens: int
    listener: Callable[[Any], None]
    options: dict[str, Any] = field(default_factory=dict)
    wants_reveal: bool = False
    wants_drafts: bool = False
    adapter: str | None = None
    is_cancelled: bool = field(default=False, init=False)
    came: float = field(default_factory=time.monotonic, init=False)

    def tell(self, event: Any) -> None:
        """Tells the listener, unless nobody waits any more; a listener that fails is one who does not."""
        if self.is_cancelled:
            return
        try:
            self.listener(event)
        except Exception:
            logger.exception("A listener failed, and its request ends.")
            self.cancel()

    def cancel(self) -> None:
        """Ends the request at the next forward; nothing more is told of it."""
        self.is_cancelled = True
