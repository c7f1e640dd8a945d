"""The model that is measured. Weights are random: no time depends on them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from pyra.backbones import geometry, schedule_for
from pyra.backbones.loading import create_backbone, preprocessing
from pyra.config import PyraConfig
from pyra.cost import Geometry
from pyra.errors import ScheduleError

LEVELS = ("low", "high")


@dataclass(frozen=True)
class Subject:
    """A timm name, the image side in pixels (None: the model's own), and where and how the model runs and merges."""

    backbone: str
    image_size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    attention: str = "auto"

    def make(self) -> nn.Module:
        """Return the plain model, with the same random weights each time."""
        torch.manual_seed(0)
        model = create_backbone(self.backbone, num_classes=100, pretrained=False, image_size=self.image_size)
        return model.to(self.device, getattr(torch, self.dtype))

    def shapes(self) -> tuple[Geometry, dict[str, list[int]]]:
        """Return the sizes of the model, and its schedules at the published levels.

        Raises:
            ScheduleError: for an image so small that nothing merges.
        """
        model = _without_memory(self.backbone, self.image_size)
        schedules = {level: schedule_for(model, preset=level) for level in LEVELS}
        if not all(map(any, schedules.values())):
            raise ScheduleError(f"nothing merges in {self.backbone} at {self.side()} px: give a larger --image-size")
        return geometry(model), schedules

    def side(self) -> int:
        """Return the image side in pixels."""
        return preprocessing(_without_memory(self.backbone, self.image_size)).image_size

    def merging(self, level: str) -> PyraConfig:
        """Return what merges at a published level, carried over to this model."""
        return PyraConfig(schedule=self.shapes()[1][level], backend=self.backend, attention=self.attention)


@functools.cache
def _without_memory(backbone: str, image_size: int | None) -> nn.Module:
    with torch.device("meta"):
        return create_backbone(backbone, num_classes=100, pretrained=False, image_size=image_size)
