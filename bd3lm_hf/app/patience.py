"""Waiting for visitors: what is shown to one who does not read it must not pile up on the server."""

import queue
import time
from asyncio import QueueEmpty
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr


# Steps that may wait at the server for a visitor to read them, each the whole page's text.
MOST_UNREAD = 16
# Seconds after which one who reads none of them is taken for gone.
LONGEST_WAIT = 20.0


def waiting_for_reader(page: gr.Blocks, steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """
    A generator function for an event of a page that goes on with its `steps` as fast as the visitor reads them, and
    ends for one who has gone. gradio itself keeps what nobody fetches, all steps of it.
    """

    def shown(request: gr.Request, *args: Any) -> Iterator[Any]:
        for step in steps(*args):
            if not is_read(unread_messages(page, request.session_hash)):
                return
            yield step

    return shown


def unread_messages(page: gr.Blocks, session_hash: str | None) -> Any:
    """The queue of what a visitor has not read; None where this version of gradio keeps none by this name."""
    messages = getattr(getattr(page, "_queue", None), "pending_messages_per_session", {})
    return messages.get(session_hash) if session_hash is not None else None


def is_read(messages: Any) -> bool:
    """Waits until a queue is nearly read, and empties it where it is not within `LONGEST_WAIT` seconds."""
    if messages is None:
        return True
    num_unread, since = messages.qsize(), time.monotonic()
    while messages.qsize() >= MOST_UNREAD:
        if messages.qsize() < num_unread:
            num_unread, since = messages.qsize(), time.monotonic()
        if time.monotonic() - since > LONGEST_WAIT:
            while not messages.empty():
                try:
                    messages.get_nowait()
                except (QueueEmpty, queue.Empty):
                    break
            return False
        time.sleep(0.05)
    return True
