"""Bulk runs on Ray Data: each actor has a model and an engine, and writes blocks of rows."""

import asyncio
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from .bulk import BulkWriter, Finish
from .engine import Engine, EngineLimits
from .requests import Stopped


# Blocks that an actor has at once, so that one can end while its engine has the rows of another.
BLOCKS_AT_ONCE = 2
# Rows of a block for each slot, and blocks of an actor, where there are that many.
BLOCKS = 4
# In place of the index of a row.
STOPPED = "stopped"


@dataclass(frozen=True)
class Pool:
    """
    The actors that write.

    Attributes:
        load: returns the model and its tokenizer, in the process that it is called in.
        limits: of each actor's engine.
        replicas: how many actors there are.
        num_cpus: that each takes.
        num_gpus: the same; None is one where the cluster has any.
    """

    load: Callable[[], tuple[Any, Any]]
    limits: EngineLimits
    replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float | None = None


class BlockWriter:
    """An actor: writes blocks of rows, several at once, so that its engine always has some."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], limits: EngineLimits, settings: dict[str, Any]):
        model, tokenizer = load()
        # Where blocks are smaller than a batch, Ray hands over more of them than it is told to.
        self._engine = Engine(model, dataclasses.replace(limits, max_queue=sys.maxsize))
        self._engine.__enter__()
        self._writer = BulkWriter(self._engine, tokenizer, settings)

    async def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """The results of rows, as JSON; where the engine stopped, why."""
        loop = asyncio.get_running_loop()
        rows = zip(block["index"].tolist(), block["line"].tolist(), strict=True)
        finished = await asyncio.gather(*(self._finish(loop, index, line) for index, line in rows))
        try:
            return {"result": [json.dumps(finish()) for finish in finished]}
        except Stopped as error:
            # Of an exception Ray tells that there was one.
            return {"result": [json.dumps({STOPPED: str(error)})]}

    async def _finish(self, loop: asyncio.AbstractEventLoop, index: int, line: str) -> Finish:
        future: asyncio.Future[Finish] = loop.create_future()
        self._writer.submit(index, line.encode(), lambda finish: loop.call_soon_threadsafe(future.set_result, finish))
        return await future


def connect() -> None:
    """To the Ray cluster that is found, or else to one that is started; what Ray tells of itself stays in its logs."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def results_on_ray(
    pool: Pool, settings: dict[str, Any], rows: Iterable[tuple[int, bytes]]
) -> Iterator[dict[str, Any]]:
    """
    As [`BulkWriter.write`], by actors of the Ray cluster that is found, or else started; in blocks.

    A row may come twice, where an actor was lost after it had written it.

    Raises:
        RuntimeError: an actor can't load the model, or its engine stopped.
    """
    connect()
    num_gpus = pool.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    # Ill-formed UTF-8 is no JSON, which the row is then told.
    items = [{"index": index, "line": line.decode(errors="replace")} for index, line in rows]
    num_slots = pool.limits.num_slots
    # Small enough that every actor has some, and that little is lost with one.
    block_size = max(min(BLOCKS * num_slots, len(items) // (BLOCKS * pool.replicas)), num_slots)
    table = ray.data.from_items(items, override_num_blocks=-(-len(items) // block_size))
    results = table.map_batches(
        BlockWriter,
        fn_constructor_args=(pool.load, pool.limits, settings),
        batch_size=block_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=pool.replicas, max_concurrent_calls_per_actor=BLOCKS_AT_ONCE),
        num_cpus=pool.num_cpus,
        num_gpus=num_gpus,
    )
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for result in map(json.loads, batch["result"].tolist()):
                if STOPPED in result:
                    raise RuntimeError(f"Ray ended the run: {result[STOPPED]}")
                yield result
    except RayError as error:
        raise RuntimeError(f"Ray ended the run: {_root_of(error)}") from error


def _root_of(error: BaseException) -> BaseException:
    """What an error of Ray's is about, which it wraps in others."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return error
