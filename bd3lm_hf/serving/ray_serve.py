"""
The server on Ray Serve: the application of [`make_app`] in each replica of each model, and a gateway before them.

The gateway holds the connections of clients. A request whose replica dies before anything was sent of its answer is
asked of another one; a stream that had begun ends with an error.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .adapters import Adapters
from .answers import ApiError, server_sent
from .api import KeyCheck, ServerLimits, make_app, read_body
from .engine import Engine, EngineLimits


logger = logging.getLogger(__name__)
# How a replica is lost.
LOST = (RayActorError, ObjectLostError, ReplicaUnavailableError)
# Replicas that one request may lose: it may be the reason.
MOST_LOST = 3
# Seconds between looks at a replica, and for a model to say that it is well.
HEALTH_PERIOD, HEALTH_PATIENCE = 2.0, 10.0
# Requests with a replica, for each of its slots: one that is free is given away without asking the gateway.
REQUESTS_PER_SLOT = 2
# Connections of the gateway, of which most wait.
MOST_CONNECTIONS = 100_000


@dataclass(frozen=True)
class Placement:
    """
    Where a model is put.

    Attributes:
        load: returns the model and its tokenizer, in the process that it is called in.
        limits: of each replica's engine; `max_queue` holds for the gateway, too.
        replicas: how many there are, or with `max_replicas` the least.
        max_replicas: up to so many, by what is asked for.
        num_cpus, num_gpus: that each takes.
        adapters: by name, the folder or Hub id of each adapter that requests may name.
    """

    load: Callable[[], tuple[Any, Any]]
    limits: EngineLimits = field(default_factory=EngineLimits)
    replicas: int = 1
    max_replicas: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    adapters: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Those of the deployment."""
        options = {
            "max_ongoing_requests": REQUESTS_PER_SLOT * self.limits.num_slots,
            # 0 would be none at all, where all replicas are taken.
            "max_queued_requests": max(self.limits.max_queue, 1),
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "health_check_period_s": HEALTH_PERIOD,
        }
        if self.max_replicas is None:
            return options | {"num_replicas": self.replicas}
        bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return options | {"autoscaling_config": {**bounds, "target_ongoing_requests": self.limits.num_slots}}


class Replica:
    """
    One copy of a model: the application, asked by the gateway.

    Args:
        placed: what is loaded.
        name: what clients call the model.
        limits: what a request may ask for.
    """

    def __init__(self, placed: Placement, name: str, limits: ServerLimits):
        model, tokenizer = placed.load()
        adapters = Adapters(model, placed.adapters) if placed.adapters else None
        self._engine = Engine(model, placed.limits, adapters)
        self._app = make_app(self._engine, tokenizer, name, None, limits)
        self._engine.__enter__()

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        if not self._engine.is_alive:
            raise RuntimeError("The engine stopped.")

    async def answer(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes):
        """What the application sends, as ASGI has it; closing this ends the request."""
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        is_gone, waiting = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(_scope(method, path, headers), receive, sent.put)
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            is_gone.set()
            task.cancel()

    def __del__(self):
        engine = getattr(self, "_engine", None)
        if engine is not None and engine.is_alive:
            engine.close()


def _scope(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
    }


class Gateway:
    """
    Passes requests on to the replicas of the model that they ask for.

    Args:
        handles: of each model's deployment, by the name that clients know the model by.
        max_body: bytes of a request's body.
    """

    def __init__(self, handles: dict[str, Any], max_body: int):
        self.handles, self.max_body = handles, max_body

    async def __call__(self, http: Request) -> Response:
        """Answers one request."""
        path, body = http.url.path, await read_body(http, self.max_body)
        headers = [(name, value) for name, value in http.headers.raw if name == b"content-type"]
        call = (http.method, path, headers, body)
        if path == "/health":
            return await self._health(call)
        if path == "/v1/models":
            cards = [json.loads((await self._begun(name, call)).first["body"]) for name in self.handles]
            return JSONResponse({"object": "list", "data": [card for page in cards for card in page["data"]]})
        if path == "/metrics":
            raise ApiError(404, "Metrics of several replicas are Ray's: see its own endpoints.", "not_found")
        begun = await self._begun(self._model_of(path, body), call)
        status, given = begun.start["status"], dict(begun.start["headers"])
        kept = {name.decode(): value.decode() for name, value in given.items() if name != b"content-length"}
        if not begun.first.get("more_body"):
            begun.stream.cancel()
            return Response(begun.first.get("body", b""), status, kept)
        return StreamingResponse(begun.rest(), status, kept)

    def _model_of(self, path: str, body: bytes) -> str:
        """Which model is asked for; the first where that is not said, which then tells what is wrong."""
        names = list(self.handles)
        try:
            is_card = path.startswith("/v1/models/")
            asked = path.removeprefix("/v1/models/") if is_card else json.loads(body)["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return names[0]
        if len(names) == 1 or not isinstance(asked, str):
            return names[0]
        for name in (asked, asked.partition(":")[0]):
            if name in self.handles:
                return name
        known = ", ".join(repr(name) for name in names)
        raise ApiError(404, f"`model` must be one of {known}, but got {asked[:80]!r}.", "model_not_found", "model")

    async def _health(self, call: tuple) -> Response:
        """Whether each model has a replica that is well."""
        try:
            asked = asyncio.gather(*(self._begun(name, call) for name in self.handles))
            statuses = [begun.start["status"] for begun in await asyncio.wait_for(asked, HEALTH_PATIENCE)]
        except (TimeoutError, asyncio.TimeoutError, ApiError):
            statuses = [503]
        is_well = max(statuses) == 200
        return JSONResponse({"status": "ok" if is_well else "stopped"}, 200 if is_well else 503)

    async def _begun(self, name: str, call: tuple) -> "Begun":
        """The answer of a replica, and of another one if that is lost before it says anything."""
        for _ in range(MOST_LOST):
            stream = self.handles[name].options(stream=True).answer.remote(*call)
            try:
                return Begun(await anext(stream), await anext(stream), stream)
            except BackPressureError as error:
                raise ApiError(429, "Too many requests wait; try again later.", "queue_full") from error
            except (RayError, ReplicaUnavailableError) as error:
                if not is_lost(error):
                    raise
                logger.warning("A replica of %s is lost; another one is asked.", name)
            except BaseException:
                stream.cancel()
                raise
        raise ApiError(503, "The request lost several replicas.", "server_lost")


@dataclass
class Begun:
    """An answer whose `start` and `first` part are there, as ASGI has them, and the `stream` of what follows."""

    start: dict[str, Any]
    first: dict[str, Any]
    stream: Any

    async def rest(self) -> AsyncIterator[bytes]:
        """The parts of the body; a replica that is lost meanwhile is told of as an error."""
        try:
            yield self.first["body"]
            async for message in self.stream:
                if message.get("body"):
                    yield message["body"]
        except (RayError, ReplicaUnavailableError) as error:
            if not is_lost(error):
                logger.error("A stream failed.", exc_info=error)
            lost = ApiError(503, "The server that wrote this was lost; ask again.", "server_lost")
            yield server_sent(lost.body()).encode()
        finally:
            self.stream.cancel()


def is_lost(error: BaseException) -> bool:
    """Whether it is the replica that is gone, and not the request that is wrong."""
    return isinstance(error, LOST) or isinstance(getattr(error, "cause", None), LOST)


def make_application(placements: dict[str, Placement], api_key: str | None, limits: ServerLimits) -> serve.Application:
    """
    What `ray.serve.run` takes.

    Args:
        placements: of each model, by the name that clients know it by.
        api_key: what they must give; None lets everybody in.
        limits: what a request may ask for.

    Raises:
        ValueError: there is no model.
    """
    if not placements:
        raise ValueError("`placements` must have at least one model, but got none.")
    replica = serve.deployment(Replica)
    bound = {
        name: replica.options(name=_deployment_of(name), **placed.options()).bind(placed, name, limits)
        for name, placed in placements.items()
    }

    def build() -> Any:
        handles = {name: serve.get_deployment_handle(_deployment_of(name)) for name in placements_names}
        return KeyCheck(_gateway_app(handles, limits), api_key) if api_key else _gateway_app(handles, limits)

    placements_names = list(placements)
    gateway = serve.deployment(serve.ingress(build)()).options(
        name="gateway", max_ongoing_requests=MOST_CONNECTIONS, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(*bound.values())


def _deployment_of(name: str) -> str:
    """The name of a model's deployment, without what Ray sets apart by, and another one for another model."""
    return "model " + name.replace("_", "__").replace("#", "_n").replace("/", "_s")


def _gateway_app(handles: dict[str, Any], limits: ServerLimits) -> Starlette:
    async def tell(http: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    async def tell_fault(http: Request, error: Exception) -> JSONResponse:
        logger.error("A request failed.", exc_info=error)
        fault = ApiError(500, "The request failed; the server's log says why.", "internal_error")
        return JSONResponse(fault.body(), 500)

    gateway = Gateway(handles, limits.max_body)

    async def answer(http: Request) -> Response:
        return await gateway(http)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
    route = Route("/{path:path}", answer, methods=methods)
    return Starlette(routes=[route], exception_handlers={ApiError: tell, Exception: tell_fault})
