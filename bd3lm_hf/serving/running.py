"""Runs the application: until it is stopped, or in a thread of a program that goes on."""

import socket
import threading
from typing import Any

import uvicorn


# Seconds that a connection is kept for a client's next request; OpenAI's client keeps it for 5, proxies mostly for 60.
KEEP_ALIVE = 75


def _server_of(app: Any) -> uvicorn.Server:
    # A client gives up a connection that it does not use sooner than the server, which else would close one that is
    # just being used again. And what it runs on is nobody's business.
    options = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": 5, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises an OSError where it can't."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def serve(app: Any, listening: socket.socket) -> None:
    """Serves an application at a socket until the process is told to stop."""
    _server_of(app).run(sockets=[listening])


class BackgroundServer:
    """
    Serves an application in a thread, at `url`, from [`start`] to [`close`] or within `with`.

    Args:
        app: what `make_app` returns.
        host, port: where to listen; 0 is a free port.

    Raises:
        OSError: it can't listen there.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0):
        self._socket = open_socket(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._server = _server_of(app)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def start(self) -> "BackgroundServer":
        """Returns when it answers."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        if not self._server.started:
            raise RuntimeError("The server ended before it had begun.")
        return self

    def close(self) -> None:
        """Ends it; what is being answered has a few seconds."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> "BackgroundServer":
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.close()
