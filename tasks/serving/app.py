"""The endpoints.

* ``GET /``: a page to try it, in one file.
* ``POST /predict?top=5``: an image as the body (``Content-Type: image/...``) or as the field ``image`` of a form.
  Answers ``{"label", "probability", "top": [{"label", "probability"}], "milliseconds": {"decode", "queue", "model",
  "total"}, "batch_size"}``.
* ``GET /health``: 200, or 503 while the server ends.
* ``GET /metrics``: for Prometheus.

What is refused is answered with ``{"error": one line}``: 400 (no image, wrong parameters), 408 (sent too slowly), 413
(too many bytes or pixels), 415 (another type), 500 (the model failed), 503 with Retry-After (full, or ending), 504 (no
answer in time).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyra.tasks.classifier import Classifier
from pyra.tasks.serving.limits import Limits
from pyra.tasks.serving.metrics import Metrics
from pyra.tasks.serving.refusals import Refused
from pyra.tasks.serving.service import Service

_PREDICT = "/predict"
_log = logging.getLogger("uvicorn.error")


def create_app(classifier: Classifier, limits: Limits | None = None) -> FastAPI:
    """Return the application that serves a classifier; its memory is bounded as :class:`Limits` says.

    Args:
        classifier: from :func:`pyra.tasks.predicting.open_classifier`.
        limits: the defaults if None.

    Returns:
        The application; its ``state.service`` is the :class:`~pyra.tasks.serving.service.Service`.
    """
    service = Service(classifier, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    # Without the pages of FastAPI, which load scripts from elsewhere.
    app = FastAPI(title="pyra", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    app.add_middleware(_Surroundings, metrics=service.metrics, policy=_policy(page))

    @app.exception_handler(HTTPException)
    async def _other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.get("/")
    async def _page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def _health() -> JSONResponse:
        if not service.healthy:
            return JSONResponse({"status": "ending"}, 503)
        most = {"max_bytes": service.limits.max_bytes, "max_pixels": service.limits.max_pixels}
        return JSONResponse({"status": "ok", **classifier.about(), **most})

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post(_PREDICT)
    async def _predict(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await service.answer(request, _top(request)))
        except Refused as refused:
            return refused.response()
        except Exception:  # of the model: the next request may be fine, and what it says is for the log
            _log.exception("the model failed")
            return JSONResponse({"error": "the model failed on this image: the log of the server says why"}, 500)

    return app


def _top(request: Request) -> int:
    given = request.query_params.get("top", "5")
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) < 10**8):
        raise Refused(400, f"top must be a whole number of at least 1, got {given[:40]!r}", unread=True)
    return int(given)


def _policy(page: str) -> str:
    """Return the content security policy of the page: its own script and style, its own server, nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Surroundings:
    """Headers for browsers around every answer, and the count of those to predictions."""

    def __init__(self, app: ASGIApp, metrics: Metrics, policy: str) -> None:
        self._app, self._metrics = app, metrics
        self._headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
                if scope["path"] == _PREDICT:
                    self._metrics.request(message["status"], time.perf_counter() - start)
            await send(message)

        await self._app(scope, receive, answer)
