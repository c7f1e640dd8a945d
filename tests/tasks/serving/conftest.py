"""Servers of a model that a test holds back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from colour_model import Model, classifier_of

from pyra.tasks.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    yield made
    made.gate.set()


@pytest.fixture
def serve(model: Model) -> Iterator[Callable[..., TestClient]]:
    """Return a client of a server with these limits."""
    from fastapi.testclient import TestClient

    from pyra.tasks.serving.app import create_app

    clients: list[TestClient] = []

    def start(**limits: float) -> TestClient:
        settings = {"max_wait_ms": 0.0, **limits}
        client = TestClient(create_app(classifier_of(model), Limits(**settings)))  # type: ignore[arg-type]
        client.__enter__()
        clients.append(client)
        return client

    yield start
    model.gate.set()
    for client in clients:
        client.__exit__(None, None, None)
