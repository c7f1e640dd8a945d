"""A server under load: how many answers a second, how long they take, whether its memory grows.

Clients are connections of plain asyncio: each sends the same image again as soon as it has an answer. What one process
can send bounds what is measured; it is enough to fill a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from pyra.errors import ConfigError, DataError

_PATIENCE = 60.0  # seconds for an answer
_BACK_OFF = 0.05  # seconds after a refusal
_BROKEN = (OSError, EOFError, ValueError, IndexError, TimeoutError, asyncio.LimitOverrunError)
"""What a connection raises that is reset, cut off, silent, or does not speak HTTP."""
_MEMORY = re.compile(r"^process_resident_memory_bytes ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True)
class LoadResult:
    """What a server did under load.

    Attributes:
        clients: that sent at once, each one request after the other.
        seconds: that new requests were sent.
        answered: requests with status 200.
        refused: requests with status 503.
        failed: requests with another status, or none: reset connections, and no answer within a minute.
        requests_per_second: answered ones.
        p50_ms, p95_ms, p99_ms: of the answered ones, from the first byte sent to the last received; None without any.
        server_megabytes_before: memory of the server's process, if its ``/metrics`` says it.
        server_megabytes_after, server_megabytes_peak: when all clients were done; the highest of two readings a second.
        failures: what went wrong, with counts.
    """

    clients: int
    seconds: float
    answered: int
    refused: int
    failed: int
    requests_per_second: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    server_megabytes_before: float | None = None
    server_megabytes_after: float | None = None
    server_megabytes_peak: float | None = None
    failures: dict[str, int] = field(default_factory=dict)


def load_test(
    url: str, image: bytes, clients: int = 64, seconds: float = 10.0, content_type: str = "image/jpeg"
) -> LoadResult:
    """Send an image to ``pyra serve`` from many clients at once.

    Args:
        url: of the server, such as ``http://127.0.0.1:8080``.
        image: encoded, as it is sent.
        clients: connections.
        seconds: to send for; requests under way then are waited for.
        content_type: of the image; the server reads its bytes whatever it says.

    Raises:
        ConfigError: for another kind of URL, or numbers below what can be done.
        DataError: where no server answers there.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise ConfigError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8080")
    if clients < 1 or not 0 < seconds < float("inf"):
        raise ConfigError(f"clients must be at least 1 and seconds above 0, got {clients} and {seconds}")
    load = _Load(parts.hostname, port, parts.path.rstrip("/"), image, content_type)
    return asyncio.run(load.run(clients, seconds))


class _Load:
    """Counts of all clients, and how one asks."""

    def __init__(self, host: str, port: int, path: str, image: bytes, content_type: str) -> None:
        self._host, self._port, self._path = host, port, path
        head = f"Content-Type: {content_type}\r\nContent-Length: {len(image)}\r\n"
        self._predict = self._request("POST", "/predict", head) + image
        self._took: list[float] = []
        self._refused = 0
        self._failures: dict[str, int] = {}
        self._peak: float | None = None

    def _request(self, method: str, path: str, head: str = "") -> bytes:
        name = f"[{self._host}]" if ":" in self._host else self._host
        return f"{method} {self._path}{path} HTTP/1.1\r\nHost: {name}:{self._port}\r\n{head}\r\n".encode()

    async def run(self, clients: int, seconds: float) -> LoadResult:
        before = await self._memory(must=True)
        start = time.perf_counter()
        watching = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(start + seconds) for _ in range(clients)))
        lasted = time.perf_counter() - start
        watching.cancel()
        after = await self._memory()
        known = [value for value in (before, self._peak, after) if value is not None]
        quantiles = [float(q) for q in np.percentile(self._took, (50, 95, 99))] if self._took else [None] * 3
        return LoadResult(
            clients=clients,
            seconds=lasted,
            answered=len(self._took),
            refused=self._refused,
            failed=sum(self._failures.values()),
            requests_per_second=len(self._took) / lasted,
            p50_ms=quantiles[0],
            p95_ms=quantiles[1],
            p99_ms=quantiles[2],
            server_megabytes_before=before,
            server_megabytes_after=after,
            server_megabytes_peak=max(known, default=None),
            failures=self._failures,
        )

    async def _client(self, until: float) -> None:
        while time.perf_counter() < until:  # a connection, and another one where it was closed
            try:
                async with self._connected() as (reader, writer):
                    while time.perf_counter() < until and await self._ask(reader, writer):
                        pass
            except _BROKEN as error:
                self._fail(type(error).__name__)
                await asyncio.sleep(_BACK_OFF)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send the image once and count what comes; return whether the connection stays."""
        start = time.perf_counter()
        status, _, stays = await _exchange(reader, writer, self._predict)
        if status == 200:
            self._took.append(1000 * (time.perf_counter() - start))
        elif status == 503:
            self._refused += 1
        else:
            self._fail(f"status {status}")
        if status != 200:
            await asyncio.sleep(_BACK_OFF)
        return stays

    def _fail(self, what: str) -> None:
        self._failures[what] = self._failures.get(what, 0) + 1

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            now = await self._memory()
            if now is not None:
                self._peak = max(now, self._peak or 0.0)

    async def _memory(self, must: bool = False) -> float | None:
        """Return the memory of the server in MB, if it tells."""
        try:
            async with self._connected() as (reader, writer):
                _, body, _ = await _exchange(reader, writer, self._request("GET", "/metrics"))
        except _BROKEN as error:
            if must:
                said = str(error) or type(error).__name__
                raise DataError(f"no server answers at {self._host}:{self._port} ({said}): start pyra serve") from None
            return None
        found = _MEMORY.search(body.decode("utf-8", "replace"))
        return float(found[1]) / 1e6 if found else None

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bytes, bool]:
    """Send a request; return the status, the body, and whether the connection stays open."""
    async with asyncio.timeout(_PATIENCE):
        writer.write(request)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]) if "content-length" in headers else 0)
        return int(first.split(" ", 2)[1]), body, headers.get("connection", "").lower() != "close"
