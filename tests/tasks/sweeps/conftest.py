"""Folders of finished runs, written without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyra.files import write_json
from pyra.tasks.results import RESULT_FILE, RunResult, evaluation_file, predictions_file

IMAGES = 400
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run that answers ``right`` of 400 images right; the wrong ones are spread by its seed.

    With ``asked`` it is an evaluation of the run at that rate.
    """

    def write_run(name: str, method: str, right: int, rate: float = 0.0, seed: int = 0, **changes: Any) -> Path:
        answers = changes.pop("answers", True)
        speed = changes.pop("speed", 100 / (1 - rate))
        asked = changes.pop("asked", None)
        known: dict[str, Any] = {
            "task": "demo", "metric": "accuracy", "schedule": [int(20 * rate)], "trained_parameters": 2000,
            "backbone": "demo", "protocol": "fixed", "majority_value": 0.25, "test_sha256": "a" * 64,
            "settings": {"lr": 0.1}, "throughput_batch_size": 16, "environment": {"device": "a CPU"},
            "peak_memory_bytes": 10**9, "macs": int(600e6 * (1 - rate)), "num_test": IMAGES,
            "images_per_second": speed, "speedup": None if speed is None else speed / 100,
        }  # fmt: skip
        own: dict[str, Any] = {"method": method, "rate": rate, "seed": seed, "value": right / IMAGES}
        folder = tmp_path / "sweep" / "runs" / name
        file = folder / (RESULT_FILE if asked is None else evaluation_file("test", asked))
        write_json(file, RunResult(**{**known, **own, **changes}))
        if answers:
            wrong = {(place * 7 + 31 * seed) % IMAGES for place in range(IMAGES - right)}
            labels = [place % 4 for place in range(IMAGES)]
            given = [(label + 1) % 4 if place in wrong else label for place, label in enumerate(labels)]
            told = {"labels": labels, "predictions": given, "split": "test", "sha256": "a" * 64}
            write_json(predictions_file(file), told)
        return folder

    return write_run


@pytest.fixture
def sweep(write: Write, tmp_path: Path) -> Path:
    """Two uncompressed methods and two that merge, two seeds each, and a run that failed."""
    for seed in range(2):
        write(f"linear-{seed}", "linear", 280 + seed, seed=seed, trained_parameters=100)
        write(f"lora-{seed}", "lora", 320 + seed, seed=seed)
        write(f"pyra-5-{seed}", "pyra", 318 + 2 * seed, 0.5, seed)
        write(f"pyra-7-{seed}", "pyra", 300 + 4 * seed, 0.7, seed)
        write(f"tome-7-{seed}", "tome", 290, 0.7, seed)
    write_json(
        tmp_path / "sweep" / "failures" / "pyra-9.json",
        {"run": "pyra-9", "options": {"rate": 0.9, "seed": None}, "error": "<b>too\nmuch", "when": "2026-11-26"},
    )
    return tmp_path / "sweep"
