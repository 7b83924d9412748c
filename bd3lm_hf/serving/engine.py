"""The engine: many requests, each in its own block and phase, under one forward after the other."""

import logging
import random
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from .. import kernels
from .adapters import Adapters
from .joint import Step, joint_steps
from .requests import Began, Ended, Failed, QueueFull, Request, Stopped
from .rows import Row
from .slots import Call, ForwardCost, Slots, groups_of


logger = logging.getLogger(__name__)
LARGEST_SEED = 2**31 - 1
COST_ON_CPU, COST_ON_ACCELERATORS = ForwardCost(16, 512), ForwardCost(512)


@dataclass
class EngineCounts:
    """
    What an engine has done, since it was made.

    Attributes:
        forwards: forwards of the model, however many requests shared one.
        tokens: tokens that were written, of requests that ended.
        row_forwards: forwards that these took, each counted for itself.
        prompt_tokens: tokens of prompts, and `reused_tokens` those of them that a slot held already.
        ended, failed, cancelled, refused: requests.
    """

    forwards: int = 0
    tokens: int = 0
    row_forwards: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0


@dataclass
class EngineLimits:
    """
    How much an engine takes on.

    Attributes:
        num_slots: requests that are written at once.
        max_length: tokens of prompt and text together, of one request.
        max_positions: of all requests that are written at once; by default what the slots hold.
        max_queue: requests that wait for a slot.
        prefill_tokens: of prompts that are read between two steps of the others.
    """

    num_slots: int = 16
    max_length: int = 2048
    max_positions: int | None = None
    max_queue: int = 64
    prefill_tokens: int = 512

    def __post_init__(self):
        if self.max_positions is None:
            self.max_positions = self.num_slots * self.max_length
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < (0 if name == "max_queue" else 1):
                raise ValueError(f"`{name}` must be a positive integer, but got {value!r}.")
        if self.max_positions < self.max_length:
            rule = f"at least `max_length`, {self.max_length}"
            raise ValueError(f"`max_positions` must be {rule}, but got {self.max_positions}.")


@dataclass
class Engine:
    """
    Writes the texts of many requests at once, in a thread of its own.

    Each request gets, token for token, what `generate` writes for it alone with its seed (in float32). It joins at the
    next forward, and its slot is free at the forward after its last. A long prompt is read in pieces between the steps
    of the others. What a new prompt shares with one that a slot holds, in whole blocks, is not read again. A request
    that fails, fails alone.

    ```python
    with Engine(model) as engine:
        engine.submit(Request(input_ids, max_new_tokens=64, listener=print, options={"seed": 0}))
    ```

    Attributes:
        model: a block diffusion language model in evaluation mode, whose attention is "sdpa" or "eager".
        limits: how much is taken on.
        adapters: what requests may be written with. Those of different ones take turns by forward.
        counts: what was done so far.

    Raises:
        ValueError: the model's attention takes no masks of several rows.
    """

    model: Any
    limits: EngineLimits = field(default_factory=EngineLimits)
    adapters: Adapters | None = None
    counts: EngineCounts = field(default_factory=EngineCounts, init=False)

    def __post_init__(self):
        attention = self.model.config.get_text_config(decoder=True)._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"`attn_implementation` must be 'sdpa' or 'eager' to serve, but got {attention!r}.")
        block_size = self.model.config.block_size
        # The last block may go beyond the end, and `generate` wants room for one more.
        num_columns = -(-self.limits.max_length // block_size) * block_size + 2 * block_size
        self._slots = Slots(self.model, self.limits.num_slots, num_columns)
        self._rows: list[Row] = []
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._is_closed, self._oldest_first = False, False
        # When each adapter had its last turn.
        self._num_turns, self._last_turns = 0, {}
        self._thread = threading.Thread(target=self._run, name="bd3lm-engine", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after the forward that it is at; what is not finished fails."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._rows)

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests on: its thread runs, and shall go on."""
        return self._thread.is_alive() and not self._is_closed

    def submit(self, *requests: Request) -> None:
        """
        Puts requests in the queue, all of them or none.

        Raises:
            QueueFull: there is no room for them.
            ValueError: one of them is longer than a slot, or empty, or of an adapter that is not there, or is to write
                nothing.
        """
        for request in requests:
            if request.max_new_tokens < 1 and not (request.max_new_tokens == 0 and request.options.get("infill")):
                rule = "at least 1, or 0 with `infill`"
                raise ValueError(f"`max_new_tokens` must be {rule}, but got {request.max_new_tokens}.")
            length = len(request.input_ids) + request.max_new_tokens
            if not request.input_ids or length > self.limits.max_length:
                rule = f"1 to {self.limits.max_length} tokens with the {request.max_new_tokens} new ones"
                raise ValueError(f"`prompt` must have {rule}, but got {len(request.input_ids)}.")
            names = () if self.adapters is None else self.adapters.names
            if request.adapter is not None and request.adapter not in names:
                rule = f"one of {', '.join(names)}" if names else "None for a model without adapters"
                raise ValueError(f"`adapter` must be {rule}, but got {request.adapter!r}.")
            if request.options.get("seed") is None:
                request.options["seed"] = random.randint(0, LARGEST_SEED)
        with self._wake:
            if self._is_closed:
                raise QueueFull("The engine is closed.")
            # Requests that go straight to a slot do not wait.
            room = self.limits.max_queue + max(self.limits.num_slots - len(self._rows), 0)
            if len(self._waiting) + len(requests) > room:
                self.counts.refused += len(requests)
                raise QueueFull(f"{len(self._waiting)} requests wait already.")
            self._waiting.extend(requests)
            self._wake.notify_all()

    def _run(self) -> None:
        num_rows, reason = self.limits.num_slots * self.model.config.block_size, "The engine is closed."
        # What is packed is of one adapter, or none.
        packed = kernels.packed(self.model, num_rows) if self.adapters is None else nullcontext()
        try:
            with torch.no_grad(), packed:
                while self._is_wanted():
                    self.step()
        except Exception as error:
            # A fault of the engine itself: nobody shall wait for what will not come.
            logger.error("The engine stopped.", exc_info=error)
            reason = "The engine stopped."
        with self._wake:
            self._is_closed = True
        for request in (*self._waiting, *(row.request for row in self._rows)):
            request.tell(Failed(Stopped(reason), is_refused=False))
        for row in self._rows:
            row.cancel()
        self._rows, self._waiting = [], deque()

    def _is_wanted(self) -> bool:
        """Waits for requests; False once the engine is closed."""
        with self._wake:
            while not (self._rows or self._waiting or self._is_closed):
                self._wake.wait()
            return not self._is_closed

    def step(self) -> None:
        """
        Lets requests in and out, reads a piece of the long prompts, and runs a forward for all others; of those of one
        adapter, whose last turn is the longest ago.
        """
        self._drop_cancelled()
        self._admit()
        rows = self._rows_in_turn()
        short = 2 * self.model.config.block_size
        self._forward(self._prompts([row for row in rows if row.call.length > short], len(rows)))
        self._forward([row for row in rows if row in self._rows and row.call.length <= short])

    def _rows_in_turn(self) -> list[Row]:
        if self.adapters is None:
            return list(self._rows)
        names = dict.fromkeys(row.request.adapter for row in self._rows)
        adapter = min(names, key=lambda name: self._last_turns.get(name, -1), default=None)
        self._num_turns += 1
        self._last_turns[adapter] = self._num_turns
        self.adapters.use(adapter)
        return [row for row in self._rows if row.request.adapter == adapter]

    def _prompts(self, rows: list[Row], num_rows: int) -> list[Row]:
        """
        Of the rows that read their prompts those that go on now; all where nobody else is written meanwhile. The first
        always does, since a piece may be longer than what is to be read at once. That is the oldest and the shortest
        in turn: so a short prompt does not wait for all of a long one, nor that for all short ones.
        """
        if len(rows) == num_rows:
            return rows
        self._oldest_first = not self._oldest_first
        if not self._oldest_first:
            rows = sorted(rows, key=lambda row: row.num_unread)
        lengths = accumulate(row.call.length for row in rows)
        return rows[: max(sum(length <= self.limits.prefill_tokens for length in lengths), 1)]

    def _drop_cancelled(self) -> None:
        with self._wake:
            num_waiting = len(self._waiting)
            self._waiting = deque(request for request in self._waiting if not request.is_cancelled)
            self.counts.cancelled += num_waiting - len(self._waiting)
        for row in [row for row in self._rows if row.request.is_cancelled]:
            row.cancel()
            self.counts.cancelled += 1
            # Nobody has looked at its numbers since its last block.
            self._retire(row, is_whole=row.cache.is_finite())

    def _admit(self) -> None:
        """Gives slots to those who wait, in their order, as long as the positions that all hold stay within bounds."""
        while self._slots.free:
            with self._wake:
                if not self._waiting:
                    return
                request = self._waiting[0]
                num_taken = sum(self._positions_of(row.request) for row in self._rows)
                if self._rows and num_taken + self._positions_of(request) > self.limits.max_positions:
                    return
                self._waiting.popleft()
            try:
                self._begin(request)
            except Exception as error:
                self._fail(request, error)
                raise

    def _positions_of(self, request: Request) -> int:
        return len(request.input_ids) + request.max_new_tokens

    def _begin(self, request: Request) -> None:
        cache = None
        try:
            ids = torch.tensor(request.input_ids, device=self.model.device)
            # Blocks that are counted from the prompt's end share nothing with those of other texts.
            num_clean = 0 if request.options.get("new_block") else self._num_clean(ids)
            cache, num_reused = self._slots.take(ids, num_clean, request.adapter)
            row = Row(self.model, request, cache)
        except Exception as error:
            if cache is not None:
                self._slots.give_back(cache, is_whole=False)
            self._fail(request, error, is_refused=isinstance(error, ValueError))
            return
        self.counts.prompt_tokens += len(ids)
        self.counts.reused_tokens += num_reused
        request.tell(Began())
        self._rows.append(row)
        if row.call is None:
            # There was nothing to be filled.
            self._finish(row)

    def _num_clean(self, ids: torch.Tensor) -> int:
        """Tokens of a prompt [length] whose keys and values another request may have left."""
        config = self.model.config
        gaps = (ids == config.mask_token_id).nonzero()
        num_clean = (int(gaps[0]) if len(gaps) else len(ids)) // config.block_size * config.block_size
        # With shifted logits the last clean token predicts the next one, and so is read again.
        return max(num_clean - (config.block_size if config.shift_logits else 0), 0)

    def _forward(self, rows: list[Row]) -> None:
        """Runs the forwards that rows wait for, and lets each go on."""
        row_of = {id(row.call): row for row in rows}
        cost = COST_ON_CPU if self.model.device.type == "cpu" else COST_ON_ACCELERATORS
        for group in groups_of([row.call for row in rows], cost, 2 * self.model.config.block_size):
            joints = joint_steps([part for part in group if isinstance(part, Step)])
            calls = [part for part in group if isinstance(part, Call)]
            outputs = self._outputs([*(joint.call for joint in joints), *calls])
            for joint, output in zip(joints, outputs):
                for step, error in zip(joint.steps, joint.resume(output), strict=True):
                    self._go_on(row_of[id(step)], error)
            for call, output in zip(calls, outputs[len(joints) :], strict=True):
                self._go_on(row_of[id(call)], output)

    def _outputs(self, calls: list[Call]) -> list[Any]:
        """What each call gets, an exception where its forward fails; for one of several rows, a list of these."""
        try:
            outputs = self._slots.forward(calls)
            self.counts.forwards += 1
            return outputs
        except Exception as error:
            rows = calls[0].rows()
            if len(calls) == len(rows) == 1:
                return [error]
            # One of them is the reason, and the others shall not suffer from it.
            logger.warning("A forward of several requests failed, and is run for each of them.", exc_info=error)
            if len(calls) > 1:
                return [self._outputs([call])[0] for call in calls]
            return [[self._outputs([row])[0] for row in rows]]

    def _go_on(self, row: Row, output: Any) -> None:
        try:
            if isinstance(output, Exception):
                row.cancel()
                raise output
            row.resume(output)
        except Exception as error:
            self._retire(row, is_whole=False)
            self._fail(row.request, error)
            return
        if row.call is None:
            self._finish(row)

    def _finish(self, row: Row) -> None:
        self._retire(row, is_whole=True)
        try:
            self._end(row)
        except Exception as error:
            # Of a criterion of one's own, say.
            self._fail(row.request, error)

    def _retire(self, row: Row, is_whole: bool) -> None:
        self._rows.remove(row)
        self._slots.give_back(row.cache, is_whole)

    def _fail(self, request: Request, error: Exception, is_refused: bool = False) -> None:
        if not is_refused:
            logger.error("A request failed.", exc_info=error)
        self.counts.failed += 1
        request.tell(Failed(error, is_refused))

    def _end(self, row: Row) -> None:
        request, output = row.request, row.output
        sequence, num_given = output.sequences[0], len(request.input_ids)
        start = 0 if request.options.get("infill") else num_given
        num_new, num_forwards = len(sequence) - num_given, int(output.num_forward_passes[0])
        log_probabilities = None
        if request.wants_reveal:
            log_probabilities = output.token_probabilities[0, start:].log().tolist()
        self.counts.ended += 1
        self.counts.row_forwards += num_forwards
        num_written = num_new + sum(token == self.model.config.mask_token_id for token in request.input_ids)
        self.counts.tokens += num_written
        is_stopped = num_new < request.max_new_tokens or self._is_stop(request, sequence)
        reason = "stop" if is_stopped else "length"
        request.tell(Ended(sequence[start:].tolist(), log_probabilities, num_forwards, reason))

    def _is_stop(self, request: Request, sequence: torch.Tensor) -> bool:
        """Whether a text ends where a rule ends it, and not for its length alone."""
        eos = request.options.get("eos_token_id", self.model.generation_config.eos_token_id)
        eos = eos if isinstance(eos, list) else [eos]
        criteria = request.options.get("stopping_criteria") or []
        return int(sequence[-1]) in eos or any(bool(criterion(sequence[None], None)) for criterion in criteria)
