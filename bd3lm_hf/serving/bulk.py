"""Many prompts at once: rows of a file, each a request of the engine, written as they finish."""

import functools
import json
import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from .engine import Engine
from .protocol import BlockDiffusionOptions, Finite, Message, PositiveInt, Share, Stop, TokenId, fault_of
from .requests import Ended, Failed, QueueFull, Request, Stopped
from .texts import Texts


# Rows that are with the engine at once, of each slot: so many that none is ever free.
ROWS_PER_SLOT = 2
# Of a row, what stands in its result again.
HANDED_ON = ("id", "prompt", "messages")
# Returns what came of a row.
Finish = Callable[[], dict[str, Any]]


class BulkRow(BlockDiffusionOptions):
    """
    One row: a `prompt`, text or ids, or the `messages` of a chat, and arguments of `generate` by their names there.

    Attributes:
        id: whatever tells the row from others; it is handed on.
        infill: fill the gaps of the prompt: its mask tokens, or what [`Gaps`] says.
    """

    id: Any = None
    prompt: str | list[TokenId] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    max_new_tokens: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[Finite, Field(gt=0)] | None = None
    top_p: Share | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    entropy_stop_threshold: Annotated[Finite, Field(ge=0)] | None = None
    entropy_stop_window: PositiveInt | None = None
    stop_strings: Stop | list[Stop] | None = None

    @model_validator(mode="after")
    def _check_row(self) -> "BulkRow":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a row must have either `prompt` or `messages`, but got both or none.")
        if self.infill and not isinstance(self.prompt, str):
            raise ValueError("`infill` must go with a `prompt` that is a text, but got none.")
        if self.infill and self.max_new_tokens is not None:
            raise ValueError("`max_new_tokens` must not go with `infill`, but got both.")
        if self.stream_drafts:
            raise ValueError("`stream_drafts` must be False, but got it.")
        return self

    def of_generate(self) -> dict[str, Any]:
        """
        The arguments of `generate` but for the length, checked as it checks them.

        Raises:
            ValueError: arguments that it would refuse.
        """
        own = {"id", "infill", "stream_drafts", "max_new_tokens", "stop_strings", "prompt", "messages"}
        options = {name: value for name, value in self.model_dump(exclude=own).items() if value is not None}
        BD3LMGenerationConfig(**options)
        return options

    @property
    def stops(self) -> list[str]:
        """The stop strings; a text ends with one, as under `generate`."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings or [])


@dataclass
class BulkWriter:
    """
    Writes rows by an engine that runs, each as `generate` writes it alone with its seed (in float32).

    Args:
        engine: writes the texts; its queue has room for `ROWS_PER_SLOT` rows of each slot.
        tokenizer: the model's.
        settings: fields of [`BulkRow`] for rows that do not say otherwise. Row i has the `seed` + i.
    """

    engine: Engine
    tokenizer: Any
    settings: dict[str, Any]

    def __post_init__(self):
        self.texts = Texts(self.engine.model, self.tokenizer)
        self.num_at_once = ROWS_PER_SLOT * self.engine.limits.num_slots

    def write(self, rows: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
        """
        What comes of rows, numbers and lines of JSON, in the order in which they finish.

        Yields:
            `index`, `id` and what was given, and then `completion` (of gaps the whole `text`), `finish_reason`,
            `seed`, `num_tokens` and `num_forwards`, or an `error`.

        Raises:
            Stopped: the engine stopped.
        """
        finished: queue.Queue[Finish] = queue.Queue()
        num_open = 0
        for index, line in rows:
            self.submit(index, line, finished.put)
            num_open += 1
            while num_open >= self.num_at_once or not finished.empty():
                yield finished.get()()
                num_open -= 1
        for _ in range(num_open):
            yield finished.get()()

    def submit(self, index: int, line: bytes, tell: Callable[[Finish], None]) -> None:
        """
        Takes on a row. `tell` is called once, in whatever thread, with a function that returns what came of the row,
        or raises [`Stopped`] where the engine stopped.
        """
        head: dict[str, Any] = {"index": index}
        try:
            given = _parsed(line)
            head |= {name: given[name] for name in HANDED_ON if name in given}
            request, as_result = self._request(BulkRow.model_validate(_with_settings(given, self.settings, index)))
        except ValidationError as error:
            tell(functools.partial(_failed, head, ValueError(_told(error))))
            return
        except ValueError as error:
            tell(functools.partial(_failed, head, error))
            return

        def listen(event: Any) -> None:
            if isinstance(event, Failed):
                tell(functools.partial(_failed, head, event.error))
            elif isinstance(event, Ended):
                tell(lambda: head | as_result(request, event))

        request.listener = listen
        try:
            self.engine.submit(request)
        except ValueError as error:
            tell(functools.partial(_failed, head, error))
        except QueueFull as error:
            tell(functools.partial(_failed, head, Stopped(str(error))))

    def _request(self, row: BulkRow) -> tuple[Request, Callable[[Request, Ended], dict[str, Any]]]:
        """What is asked of the engine, and what makes a result of its answer."""
        options, texts = row.of_generate(), self.texts
        if criteria := texts.stopping_criteria(row.stops):
            options["stopping_criteria"] = criteria
        if row.infill:
            inputs = texts.encode_gaps(row.prompt, row.infill, self.engine.limits.max_length)
            ids, length = inputs["input_ids"][0].tolist(), 0
            options |= {"infill": True, "suppress_tokens": texts.special_ids}
        else:
            ids = texts.encode_chat(row.messages) if row.prompt is None else texts.encode(row.prompt)
            length = row.max_new_tokens

        def as_result(request: Request, ended: Ended) -> dict[str, Any]:
            if row.infill:
                filled = texts.filled(inputs, ended.token_ids, ended.log_probabilities)
                texts_of = {"text": filled["text"], "spans": filled["spans"]}
                num_tokens = ids.count(texts.mask_token_id)
            else:
                texts_of = {"completion": texts.decode(ids, ended.token_ids)}
                num_tokens = len(ended.token_ids)
                texts_of["finish_reason"] = ended.finish_reason
            counts = {"num_tokens": num_tokens, "num_forwards": ended.num_forwards}
            return {**texts_of, "seed": request.options["seed"], **counts}

        return Request(ids, length, _nobody, options, wants_reveal=bool(row.infill)), as_result


def check_settings(settings: dict[str, Any]) -> None:
    """
    Whether settings for all rows can be those of any.

    Raises:
        ValueError: they can't.
    """
    try:
        BulkRow.model_validate({"prompt": "", **settings}).of_generate()
    except ValidationError as error:
        raise ValueError(_told(error)) from None


def _nobody(event: Any) -> None:
    """Listens to a request until it is known what is to be made of it."""


def _failed(head: dict[str, Any], error: BaseException) -> dict[str, Any]:
    if isinstance(error, Stopped):
        raise error
    return head | {"error": str(error) or type(error).__name__}


def _parsed(line: bytes) -> dict[str, Any]:
    """A row; raises a ValueError where it is no object of JSON."""
    try:
        row = json.loads(line)
        # Numbers that JSON does not have would be handed on.
        json.dumps(row, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a row must be a JSON object, but got {line[:80]!r} ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, but got {line[:80]!r}.")
    return row


def _with_settings(row: dict[str, Any], settings: dict[str, Any], index: int) -> dict[str, Any]:
    merged = settings | row
    if "seed" not in row and merged.get("seed") is not None:
        merged["seed"] += index
    if merged.get("infill") and "max_new_tokens" not in row:
        # The length of a text whose gaps are filled is given.
        merged.pop("max_new_tokens", None)
    return merged


def _told(error: ValidationError) -> str:
    place, message = fault_of(error)
    return f"{place}: {message}" if place else message
