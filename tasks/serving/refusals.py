"""Answers that are none: a status, one line of JSON, and what becomes of the rest of the request."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

_LINGER = 5.0  # seconds


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: one line for whoever sent it.
        again: seconds after which it may be tried again, or None.
        unread: whether some of the request's body may not have been read.
    """

    def __init__(self, status: int, message: str, *, again: int | None = None, unread: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.again, self.unread = status, message, again, unread

    def response(self) -> JSONResponse:
        """Return what is sent."""
        headers = {} if self.again is None else {"Retry-After": str(self.again)}
        kind = _Lingering if self.unread else JSONResponse
        return kind({"error": self.message}, self.status, headers)


def busy(message: str, *, unread: bool = False) -> Refused:
    """Return a refusal for now: the server is full, or about to end."""
    return Refused(503, message, again=1, unread=unread)


class _Lingering(JSONResponse):
    """A refusal that comes while the client still sends.

    It is sent at once; then what comes is read and dropped for some seconds, so that a client that only listens when it
    has sent everything hears it, too: a connection that is closed on unread bytes is reset. Then the connection ends.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
