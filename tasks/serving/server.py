"""uvicorn around the application, until a signal ends it."""

from __future__ import annotations

import errno
import math
import signal
import socket
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from PIL import Image

from pyra.errors import ConfigError
from pyra.tasks.classifier import Classifier
from pyra.tasks.serving.app import create_app
from pyra.tasks.serving.limits import Limits
from pyra.tasks.serving.service import Service

_BACKLOG = 128
_KEEP_ALIVE = 15  # seconds between two requests of a connection
_HEADERS = 10.0  # seconds that a connection may take for the headers of its first request


def bound_socket(host: str = "127.0.0.1", port: int = 8080) -> socket.socket:
    """Take an address, before a model is opened for nothing; connections are refused until it is served.

    Args:
        host: address to listen on; the default is reached from this machine only.
        port: to listen on; 0 takes a free one.

    Raises:
        ConfigError: where it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be in 0..65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use: choose another --port, or 0 for a free one") from None
        raise ConfigError(f"cannot listen on port {port} of {host}: {error.strerror}; choose another --port") from None
    return bound


def serve(
    classifier: Classifier,
    where: socket.socket,
    *,
    limits: Limits | None = None,
    started: Callable[[str], None] = print,
) -> int:
    """Serve a classifier until SIGINT or SIGTERM; requests in work are answered first. For the main thread.

    Args:
        classifier: from :func:`pyra.tasks.predicting.open_classifier`.
        where: to listen, from :func:`bound_socket`.
        limits: the defaults if None.
        started: called with the server's address when it answers.

    Returns:
        The signal that ended it.
    """
    limits = limits or Limits()
    app = create_app(classifier, limits)
    config = uvicorn.Config(
        app,
        limit_concurrency=limits.max_connections,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(limits.timeout_s) + 5,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="error",
    )
    # Said of images that are refused anyway.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    name, port = where.getsockname()[:2]
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    server = _Server(config, app.state.service, lambda: started(address))
    server.run(sockets=[where])
    return server.ended_by


class _Server(uvicorn.Server):
    """Says when it answers, refuses requests from the signal on, and ends connections that send nothing.

    The signal is not raised again in the end: whoever called decides what it means.
    """

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._when_started = service, started
        self._silent: dict[Any, tuple[Any, float]] = {}
        self.ended_by = int(signal.SIGTERM)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.closing = True
        self.ended_by = sig
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._end_silent()
        return await super().on_tick(counter)

    def _end_silent(self) -> None:
        """End connections on which no request has begun for long: uvicorn waits for headers without end."""
        now = time.monotonic()
        before, self._silent = self._silent, {}
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                continue
            known, since = before.get(connection, (cycle, now))
            self._silent[connection] = (cycle, since if known is cycle else now)
            if now - self._silent[connection][1] > (_HEADERS if cycle is None else _HEADERS + _KEEP_ALIVE):
                connection.transport.close()
