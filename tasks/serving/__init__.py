"""A classifier behind HTTP: batches across requests, bounds on everything that is held, a page, metrics.

limits.py     what is allowed
bodies.py     an image out of a request, never more of it than allowed
batching.py   one thread that runs the model on what has come together
service.py    one request from its first byte to its answer
refusals.py   the answers that are none
metrics.py    what Prometheus reads
app.py        the endpoints
server.py     uvicorn around them, until a signal ends it
page.html     the page for people

Needs the extra ``serve``; importing this package does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyra.export.formats import need

if TYPE_CHECKING:
    from pyra.tasks.serving.app import create_app
    from pyra.tasks.serving.limits import Limits
    from pyra.tasks.serving.server import bound_socket, serve

__all__ = ["Limits", "bound_socket", "create_app", "need_libraries", "serve"]

_HOMES = {"Limits": "limits", "bound_socket": "server", "create_app": "app", "serve": "server"}
_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def need_libraries() -> None:
    """Raise :class:`~pyra.errors.ConfigError`, which names the extra to install, where a library is missing."""
    for library in _LIBRARIES:
        need(library, "serving", "serve")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyra.tasks.serving' has no attribute {name!r}")
    need_libraries()
    return getattr(importlib.import_module(f"pyra.tasks.serving.{_HOMES[name]}"), name)
