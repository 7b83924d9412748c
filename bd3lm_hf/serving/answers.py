"""What clients get, as OpenAI's API has it."""

import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .requests import Draft, Ended, Request, Written
from .texts import Texts, TextWriter


# OpenAI's, for what has no probability.
LEAST_LOG_PROBABILITY = -9999.0


class ApiError(Exception):
    """An error as the API tells it: the HTTP `status`, what is wrong, OpenAI's `code` for it, and the field."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(eq=False)
class Job:
    """
    One choice of an answer.

    Attributes:
        request: the engine's.
        writer: the text as far as it is known.
        filled: from what the engine ended with to a filled text and its spans, for a text with gaps.
        echo: a text that comes before the new one.
        log_probabilities: of the tokens that are known.
    """

    request: Request
    writer: TextWriter
    filled: Callable[[Ended], dict[str, Any]] | None = None
    echo: str = ""
    log_probabilities: list[float] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def finish_reason(self) -> str:
        """Why the text ended; a stop string may also be one of characters that special tokens lie between."""
        return "stop" if self.writer.is_stopped else self.ended.finish_reason

    def take(self, event: Written | Ended) -> str:
        """What an event of the engine adds to the text."""
        if isinstance(event, Written):
            self.log_probabilities += event.log_probabilities or []
            return self.writer.add(event.token_ids)
        self.ended = event
        return self.writer.add([], is_last=True)


class Answer:
    """
    The answer to one HTTP request, of a choice for each of the `jobs`: whole, or chunk by chunk.

    Args:
        texts: the model's tokenizer.
        model: the name that clients know the model by.
        jobs: the choices.
        num_prompts: prompts, each of which `jobs` has equally many choices of, in their order.
        is_chat: whether it is a chat that is answered.
        with_logprobs: whether log-probabilities are told.
    """

    def __init__(
        self, texts: Texts, model: str, jobs: list[Job], num_prompts: int, is_chat: bool, with_logprobs: bool
    ):
        self.texts, self.jobs, self.num_prompts = texts, jobs, num_prompts
        self.is_chat, self.with_logprobs = is_chat, with_logprobs
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, job) for index, job in enumerate(self.jobs)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens, and how many forwards wrote them."""
        num_copies = len(self.jobs) // self.num_prompts
        num_prompt = sum(len(job.request.input_ids) for job in self.jobs[::num_copies])
        ended = [job.ended for job in self.jobs if job.ended is not None]
        num_forwards = sum(part.num_forwards for part in ended)
        num_new = sum(self._num_written(job) for job in self.jobs if job.ended is not None)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "forwards": num_forwards,
            "tokens_per_forward": num_new / max(num_forwards, 1),
        }

    def _num_written(self, job: Job) -> int:
        if job.filled is None:
            return len(job.ended.token_ids)
        return job.request.input_ids.count(self.texts.mask_token_id)

    def _choice(self, index: int, job: Job) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": job.finish_reason, "logprobs": None}
        choice["block_diffusion"] = {
            "seed": job.request.options["seed"],
            "forwards": job.ended.num_forwards,
            "tokens_per_forward": self._num_written(job) / max(job.ended.num_forwards, 1),
        }
        if job.filled is not None:
            filled = job.filled(job.ended)
            choice["block_diffusion"]["spans"] = filled["spans"]
            return choice | {"text": filled["text"], "finish_reason": "stop"}
        if self.with_logprobs:
            choice["logprobs"] = self._logprobs(job, 0, "")
        text = job.echo + job.writer.text
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return choice | body

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with: whose turn it is, or the prompts that are to be echoed."""
        if self.is_chat:
            delta = {"role": "assistant", "content": ""}
            return [self._chunk(index, {"delta": delta}) for index in range(len(self.jobs))]
        return [self._chunk(index, {"text": job.echo}) for index, job in enumerate(self.jobs) if job.echo]

    def chunk(self, index: int, event: Any) -> dict[str, Any] | None:
        """The chunk that tells of an event of the engine, None where there is nothing to tell."""
        job = self.jobs[index]
        if isinstance(event, Draft):
            draft = self.texts.decode(job.request.input_ids, [*job.writer.ids, *event.token_ids], special=True)
            body = {"delta": {}} if self.is_chat else {"text": ""}
            return self._chunk(index, body | {"block_diffusion": {"draft": draft}})
        if not isinstance(event, (Written, Ended)):
            return None
        num_told, before = len(job.writer.ids), job.writer.text
        text = job.take(event)
        body: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        if self.with_logprobs and isinstance(event, Written):
            body["logprobs"] = self._logprobs(job, num_told, before)
        if job.ended is not None:
            body["finish_reason"] = job.finish_reason
            return self._chunk(index, body)
        return self._chunk(index, body) if text or body.get("logprobs") else None

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._chunk_head, "choices": [], "usage": self.usage()}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk" if self.is_chat else "text_completion"}

    def _chunk(self, index: int, body: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": None, "logprobs": None} | body
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, job: Job, start: int, before: str) -> dict[str, Any]:
        """Log-probabilities of the tokens from the `start`-th on, when they were revealed."""
        ids, values = job.writer.ids[start:], job.log_probabilities[start:]
        tokens = [self.texts.tokenizer.decode([token]) for token in ids]
        values = [value if math.isfinite(value) else LEAST_LOG_PROBABILITY for value in values]
        if self.is_chat:
            parts = zip(tokens, values, strict=True)
            content = [
                {"token": token, "logprob": value, "bytes": [*token.encode()], "top_logprobs": []}
                for token, value in parts
            ]
            return {"content": content, "refusal": None}
        offsets, end = [], len(job.echo) + len(before)
        for token in ids:
            offsets.append(end)
            end += len(self.texts.tokenizer.decode([token], skip_special_tokens=True))
        return {"tokens": tokens, "token_logprobs": values, "text_offset": offsets, "top_logprobs": None}


def server_sent(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"
