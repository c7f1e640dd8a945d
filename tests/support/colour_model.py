"""A model of three colours that waits until it may answer, and pictures of these colours."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import torch
from PIL import Image

from pyra.tasks.classifier import Classifier

COLOURS = ("red", "green", "blue")


class Model:
    """Logits are the mean colour. It answers while its gate is open, and remembers the batches it has seen."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.batches: list[int] = []
        self.error: Exception | None = None

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixel_values))
        self.begun.release()
        assert self.gate.wait(20), "the gate was never opened"
        if self.error is not None:
            raise self.error
        return 10 * pixel_values.mean((2, 3))


def classifier_of(model: Model) -> Classifier:
    return Classifier(
        COLOURS, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "onnx", "fake", model, task="colours", backbone="tiny"
    )


def picture(colour: str = "red", size: tuple[int, int] = (12, 9), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[colour]).save(buffer, form)
    return buffer.getvalue()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition; fail where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
