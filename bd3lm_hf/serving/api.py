"""The server: OpenAI's API over an [`Engine`]."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from . import requests
from .answers import Answer, ApiError, Job, server_sent
from .engine import Engine
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, InfillRequest, SamplingRequest, fault_of
from .requests import Draft, Ended, Failed, QueueFull
from .texts import Texts


logger = logging.getLogger(__name__)
# Without a key: what asks whether a server is alive has none.
OPEN_PATHS = ("/health",)
# Events of an answer that its client has not read yet, from which on drafts are left out.
MOST_UNREAD = 64
# A status that nobody is told.
GONE = 499
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class ServerLimits:
    """
    What one HTTP request may ask for.

    Attributes:
        max_body: bytes of its body.
        max_choices: texts, of all its prompts together.
    """

    max_body: int = 2**20
    max_choices: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, but got {value!r}.")


class _EventQueue:
    """The events of an answer, numbered by its choices, from the engine's thread to the loop in which it is made."""

    def __init__(self):
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        # By a thread each. The queue's own size leaves out what the loop has not come to put there yet.
        self._num_put, self._num_taken = 0, 0

    def put(self, index: int, event: Any) -> None:
        """Called by the engine's thread."""
        # Drafts that come after it tell what a slow client has missed.
        if isinstance(event, Draft) and self._num_put - self._num_taken >= MOST_UNREAD:
            return
        self._num_put += 1
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def get(self) -> tuple[int, Any]:
        """The next event."""
        event = await self._queue.get()
        self._num_taken += 1
        return event


class Server:
    """
    A model behind OpenAI's API.

    Args:
        engine: writes the texts.
        tokenizer: the model's.
        name: what clients call the model; with one of its adapters it is `name:adapter`.
        limits: what a request may ask for.
    """

    def __init__(self, engine: Engine, tokenizer: Any, name: str, limits: ServerLimits = ServerLimits()):
        self.engine, self.name, self.limits = engine, name, limits
        # By the names that clients know, the adapter that is meant.
        adapters = () if engine.adapters is None else engine.adapters.names
        self._names = {name: None, **{f"{name}:{adapter}": adapter for adapter in adapters}}
        self.texts, self.metrics = Texts(engine.model, tokenizer), Metrics(engine)

    async def chat(self, http: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer(http, await self._read(http, ChatRequest))

    async def complete(self, http: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answer(http, await self._read(http, CompletionRequest))

    async def infill(self, http: Request) -> Response:
        """`POST /v1/infill`."""
        return await self._answer(http, (await self._read(http, InfillRequest)).as_completion())

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._card(name) for name in self._names]}

    async def model(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        self._check_name(name)
        return self._card(name)

    async def health(self) -> JSONResponse:
        """`GET /health`."""
        is_alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    async def scrape(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _card(self, name: str) -> dict[str, Any]:
        sizes = {"max_model_len": self.engine.limits.max_length, "block_size": self.engine.model.config.block_size}
        tokenizer = self.texts.tokenizer
        facts = {"mask_token": tokenizer.mask_token, "has_chat_template": tokenizer.chat_template is not None}
        return {"id": name, "object": "model", "created": 0, "owned_by": "bd3lm-hf", **sizes, **facts}

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            message = f"`model` must be {' or '.join(map(repr, self._names))}, but got {name[:80]!r}."
            raise ApiError(404, message, "model_not_found", "model")

    async def _read(self, http: Request, kind: type[Model]) -> Model:
        """The body of a request, of limited size."""
        try:
            asked = kind.model_validate_json(await read_body(http, self.limits.max_body))
        except ValidationError as error:
            raise _told(error) from error
        self._check_name(asked.model)
        return asked

    async def _answer(self, http: Request, asked: SamplingRequest) -> Response:
        events = _EventQueue()
        try:
            jobs, num_prompts = await run_in_threadpool(self._jobs, asked, events.put)
            answer = Answer(
                self.texts, asked.model, jobs, num_prompts, isinstance(asked, ChatRequest), _wants_logprobs(asked)
            )
            self.engine.submit(*(job.request for job in jobs))
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            if not self.engine.is_alive:
                raise ApiError(503, "The server is stopping.", "stopped") from error
            raise ApiError(429, "Too many requests wait; try again later.", "queue_full") from error
        gone = asyncio.ensure_future(_until_gone(http))
        try:
            first = await self._next(events, gone)
            if asked.stream:
                return _Events(self._stream(answer, events, first, asked), jobs)
            await self._collect(answer, events, first, gone)
            return JSONResponse(await run_in_threadpool(answer.whole))
        except BaseException:
            _cancel(jobs)
            raise
        finally:
            # A stream looks after its client itself.
            gone.cancel()

    def _jobs(self, asked: SamplingRequest, listen: Any) -> tuple[list[Job], int]:
        """The choices that are asked for, and how many prompts they are of."""
        prompts = asked.prompts if isinstance(asked, CompletionRequest) else [None]
        num_choices = len(prompts) * asked.n
        if num_choices > self.limits.max_choices:
            rule = f"at most {self.limits.max_choices} texts together"
            raise ValueError(f"`prompt` and `n` must ask for {rule}, but got {num_choices}.")
        options = asked.of_generate(self.texts.vocab_size)
        if criteria := self.texts.stopping_criteria(asked.stops):
            options["stopping_criteria"] = criteria
        jobs: list[Job] = []
        for prompt in prompts:
            jobs += self._jobs_of(asked, prompt, options, len(jobs), listen)
        return jobs, len(prompts)

    def _jobs_of(self, asked: Any, prompt: Any, options: dict[str, Any], first: int, listen: Any) -> list[Job]:
        """The choices of one prompt, numbered from `first` on; a chat has the prompt None."""
        texts, filled, echo = self.texts, None, ""
        gaps = asked.block_diffusion.infill
        if gaps:
            inputs = texts.encode_gaps(prompt, gaps, self.engine.limits.max_length)
            ids, max_new_tokens = inputs["input_ids"][0].tolist(), 0
            options = options | {"infill": True, "suppress_tokens": texts.special_ids}

            def filled(ended: Ended) -> dict[str, Any]:
                return texts.filled(inputs, ended.token_ids, ended.log_probabilities)
        elif prompt is None:
            ids = texts.encode_chat(asked.messages)
            max_new_tokens = asked.limit or max(self.engine.limits.max_length - len(ids), 1)
        else:
            ids, max_new_tokens = texts.encode(prompt), asked.max_tokens
            if asked.echo:
                echo = prompt if isinstance(prompt, str) else texts.decode([], ids)
        if (least := options.get("min_new_tokens", 0)) > max_new_tokens and not gaps:
            # `generate` warns of each such pair of numbers anew.
            raise ValueError(f"`min_new_tokens` must be at most `max_tokens`, {max_new_tokens}, but got {least}.")
        jobs = []
        for copy in range(asked.n):
            own = dict(options)
            if asked.seed is not None:
                own["seed"] = asked.seed + copy
            request = requests.Request(
                input_ids=ids,
                max_new_tokens=max_new_tokens,
                listener=lambda event, index=first + copy: listen(index, event),
                options=own,
                wants_reveal=_wants_logprobs(asked) or bool(gaps),
                wants_drafts=asked.block_diffusion.stream_drafts,
                adapter=self._names[asked.model],
            )
            self.metrics.watch(request)
            jobs.append(Job(request, texts.writer(ids, asked.stops), filled, echo))
        return jobs

    async def _next(self, events: _EventQueue, gone: asyncio.Future) -> tuple[int, Any]:
        """The next event; raises an error where a request failed, or the client is `gone`."""
        wanted = asyncio.ensure_future(events.get())
        try:
            await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ApiError(GONE, "The client left.")
            index, event = wanted.result()
        finally:
            wanted.cancel()
        if isinstance(event, Failed):
            raise _failure(event)
        return index, event

    async def _collect(
        self, answer: Answer, events: _EventQueue, first: tuple[int, Any], gone: asyncio.Future
    ) -> None:
        """Takes events until all choices have ended."""
        index, event = first
        while True:
            if isinstance(event, (Ended, requests.Written)):
                answer.jobs[index].take(event)
            if all(job.ended is not None for job in answer.jobs):
                return
            index, event = await self._next(events, gone)

    async def _stream(self, answer: Answer, events: _EventQueue, first: tuple[int, Any], asked: SamplingRequest):
        """The server-sent events of an answer; an error ends them."""
        for chunk in answer.first_chunks():
            yield server_sent(chunk)
        index, event = first
        while True:
            if isinstance(event, Failed):
                yield server_sent(_failure(event).body())
                return
            if (chunk := answer.chunk(index, event)) is not None:
                yield server_sent(chunk)
            if all(job.ended is not None for job in answer.jobs):
                break
            index, event = await events.get()
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield server_sent(answer.usage_chunk())
        yield server_sent("[DONE]")


class _Events(StreamingResponse):
    """Server-sent events, whose requests end with the connection, however early."""

    def __init__(self, content: AsyncIterator[str], jobs: list[Job]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._jobs = jobs

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            _cancel(self._jobs)


async def read_body(http: Request, max_body: int) -> bytes:
    """The body of a request; raises an [`ApiError`] where it has more than `max_body` bytes, or its client leaves."""
    body = b""
    try:
        async for part in http.stream():
            body += part
            if len(body) > max_body:
                raise ApiError(413, f"The body must have at most {max_body} bytes.", "too_large")
    except ClientDisconnect:
        raise ApiError(GONE, "The client left.") from None
    return body


async def _until_gone(http: Request) -> None:
    """Returns once the client has closed its connection; its body is read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        if job.ended is None:
            job.request.cancel()


def _wants_logprobs(asked: SamplingRequest) -> bool:
    logprobs = asked.logprobs
    return logprobs is not None and logprobs is not False


def _failure(event: Failed) -> ApiError:
    """What a client is told of a failure: of what it asked for all, of the server's own nothing."""
    if event.is_refused:
        return ApiError(400, str(event.error))
    return ApiError(500, "The request failed; the server's log says why.", "internal_error")


def _told(error: ValidationError) -> ApiError:
    """The first fault of a body, in one line."""
    place, message = fault_of(error)
    return ApiError(400, f"{place}: {message}" if place else message, "invalid_request", place or None)


class KeyCheck:
    """Lets in whoever has the key, and nobody else: of anything but `/health` a wrong one gets no more than 401."""

    def __init__(self, app: Any, api_key: str):
        self.app, self.expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = ApiError(401, "The API key is wrong or missing.", "invalid_api_key")
                await JSONResponse(refusal.body(), 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(
    engine: Engine,
    tokenizer: Any,
    name: str,
    api_key: str | None = None,
    limits: ServerLimits = ServerLimits(),
) -> FastAPI:
    """
    The application that serves a model.

    Args:
        engine: writes the texts; it is started and closed with the application.
        tokenizer: the model's.
        name: what clients call the model.
        api_key: what they must give; None lets everybody in.
        limits: what a request may ask for.
    """
    server = Server(engine, tokenizer, name, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for path, method, endpoint in (
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/completions", "POST", server.complete),
        ("/v1/infill", "POST", server.infill),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.model),
        ("/health", "GET", server.health),
        ("/metrics", "GET", server.scrape),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    @app.exception_handler(ApiError)
    async def tell(http: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def tell_http(http: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code)

    @app.exception_handler(Exception)
    async def tell_fault(http: Request, error: Exception) -> JSONResponse:
        logger.error("A request failed.", exc_info=error)
        return JSONResponse(_failure(Failed(error, is_refused=False)).body(), 500)

    if api_key is not None:
        app.add_middleware(KeyCheck, api_key=api_key)
    return app
