"""Rows of results to draw."""

from __future__ import annotations

import pytest

from pyra.tasks.results import RunResult


@pytest.fixture(scope="session")
def make():
    """A row of which only what a test is about has to be named."""
    return row


def row(method="pyra", value=0.5, speed=100.0, macs=1_000_000_000, **changes):
    fields = {"task": "demo", "metric": "accuracy", "schedule": [0], "rate": 0.0, "trained_parameters": 1930, "seed": 0}
    return RunResult(method=method, value=value, images_per_second=speed, macs=macs, **(fields | changes))


@pytest.fixture
def rows():
    return [
        row("linear probe", 0.452, 812.4, 356_000_000, speedup=1.0),
        row("LoRA", 0.683, 806.0, 356_000_000, speedup=1.0, trained_parameters=59_914),
        row("LoRA + ToMe", 0.581, 2501.0, 103_200_000, speedup=3.08, rate=0.71, trained_parameters=59_914),
        row("LoRA + PYRA", 0.604, 2421.0, 103_200_000, speedup=2.98, rate=0.71, trained_parameters=66_102),
    ]
