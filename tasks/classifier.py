"""A classifier of images, whatever computes it: a model, how its images are prepared, the names of its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pyra.errors import TrainingError
from pyra.tasks.data.decoding import squash
from pyra.tasks.data.images import by_channel, normalise


@dataclass(frozen=True)
class Score:
    """A class and its probability, in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """A model, how its images are prepared, and the names of what it answers.

    Attributes:
        labels: the class names, in the order of the logits.
        image_size: side ``S`` of the square in pixels.
        mean: of each channel, on the scale 0..1.
        std: of each channel, on the scale 0..1.
        format: ``run``, or the format of an export.
        runtime: that computes it.
        run: the model, float32 pixel values [B, 3, S, S] to logits [B, classes].
        task: it was trained on, if that is known.
        backbone: it was made from, if that is known.
    """

    labels: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    format: str
    runtime: str
    run: Callable[[Tensor], Tensor]
    task: str = ""
    backbone: str = ""

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, classes] of normalised pixel values [B, 3, S, S]."""
        return self.run(pixel_values)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return an RGB image of any size as the model's square, uint8 [3, S, S], as evaluation makes it."""
        return torch.from_numpy(squash(image, self.image_size, "bicubic"))

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities [B, classes], float32, of prepared images uint8 [B, 3, S, S].

        Raises:
            TrainingError: where a logit is NaN or infinite.
        """
        logits = self(normalise(pixels, by_channel(self.mean), by_channel(self.std))).float()
        if not bool(logits.isfinite().all()):
            raise TrainingError("the model gives logits that are NaN or infinite: train it again, or export it again")
        return logits.softmax(-1)

    def best(self, probabilities: Tensor, top: int) -> list[Score]:
        """Return the ``top`` most probable classes of one image (all where there are fewer), the best one first.

        Args:
            probabilities: [classes].
            top: at least 1.
        """
        values, indices = probabilities.sort(descending=True, stable=True)  # a tie as argmax breaks it
        pairs = zip(indices[:top].tolist(), values[:top].tolist(), strict=True)
        return [Score(self.labels[index], value) for index, value in pairs]

    def about(self) -> dict[str, str | int]:
        """Return what it is, for people and programs that ask a server: nothing that tells where its files lie."""
        return {
            "format": self.format,
            "runtime": self.runtime,
            "task": self.task,
            "backbone": self.backbone,
            "classes": len(self.labels),
            "image_size": self.image_size,
        }
