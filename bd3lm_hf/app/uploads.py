"""What the page's server takes from visitors: the text and the numbers of a request, and no file."""

import json
from collections.abc import Awaitable, Callable
from typing import Any


# Of a request: many times what the page's text boxes are made for.
MOST_BYTES = 1_000_000
# What gradio calls a file in a request, which it would move to its cache, or fetch from an address.
FILE_MARK = "gradio.FileData"
NO_FILES = "This page takes no files."

Message = dict[str, Any]


class NoUploads:
    """
    Refuses files before gradio sees them, which keeps an upload open to everybody whether or not a page has use for
    one, and stores what it gets. An ASGI middleware.

    Args:
        app: The application that it stands before.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        """Answers 403 to files and 413 to requests of more than `MOST_BYTES`; hands on all others."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        content_type = dict(scope["headers"]).get(b"content-type", b"").lower()
        if scope["path"].rstrip("/").endswith("/upload") or content_type.startswith(b"multipart/"):
            await _answer(send, 403, NO_FILES)
            return
        body, is_complete = b"", False
        while not is_complete:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            if len(body) > MOST_BYTES:
                await _answer(send, 413, f"A request may have {MOST_BYTES:,} bytes at most.")
                return
        if _names_a_file(body):
            await _answer(send, 403, NO_FILES)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, receive_again, send)


def _names_a_file(body: bytes) -> bool:
    try:
        # Written anew, as a character of JSON can be spelled in two ways.
        return FILE_MARK in json.dumps(json.loads(body))
    except (ValueError, RecursionError):
        return False


async def _answer(send: Callable, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
