"""The data set that training and evaluation read: images decoded once, as normalised tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from PIL import Image

from pyra.errors import ConfigError, DataError, did_you_mean
from pyra.tasks.data.decoding import INTERPOLATIONS, decode_row, decoded, squash, summary, unreadable_rows
from pyra.tasks.data.pixel_cache import PixelCache, Pixels

MEMORY_LIMIT = 2 * 1024**3
"""Decoded bytes up to which a data set is kept in memory where there is no cache."""

_NAMED = 5


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels [..., 3, S, S] as a model takes them, float32.

    Args:
        pixels: 0..255.
        mean: [3, 1, 1] on the scale 0..1, as :func:`by_channel` makes it.
        std: the same.
    """
    return pixels.float().div_(255).sub_(mean).div_(std)


def by_channel(values: Sequence[float]) -> torch.Tensor:
    """Return three numbers as float32 [3, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


class ImageDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples ``{"pixel_values": float32 [3, S, S] normalised, "labels": int}`` of one split.

    Every image is decoded once here, in threads, or was decoded in an earlier run: so a damaged file is found before
    training starts. The resized pixels are one uint8 tensor, mapped from the cache; without a cache they are kept in
    memory up to :data:`MEMORY_LIMIT`, and above that images are decoded on access.

    Args:
        rows: columns `image` (``{"bytes", "path"}``), `label` (class index) and `source` (what errors call the row).
        image_size: side ``S`` of the square in pixels.
        mean: per channel, on the scale 0..1.
        std: per channel, on the scale 0..1.
        interpolation: a resampling filter of Pillow, by name.
        skip_broken: leave unreadable images out and list them in ``broken``.
        name: what errors and the progress bar call this data set.
        cache: where decoded images are kept, or None.

    Attributes:
        pixels: uint8 [images, 3, S, S], or None above :data:`MEMORY_LIMIT` without a cache.
        broken: what was left out, with the reason.

    Raises:
        DataError: an image cannot be read and ``skip_broken`` is off, or no image of a class is left.
        ConfigError: unknown ``interpolation``, or an ``image_size`` below 1.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        skip_broken: bool = False,
        name: str = "images",
        cache: PixelCache | None = None,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            hint = did_you_mean(interpolation, INTERPOLATIONS)
            raise ConfigError(f"unknown interpolation {interpolation!r}{hint}; choose from {', '.join(INTERPOLATIONS)}")
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}; it must be at least 1 pixel")
        if len(rows) == 0:
            raise DataError(f"{name} is empty: add images to it")
        self.image_size = image_size
        self.interpolation = interpolation
        self._mean, self._std = by_channel(mean), by_channel(std)
        found = None if cache is None else cache.open(rows, image_size, interpolation, name)
        if found is None:
            found = _decode(rows, image_size, interpolation, name)
        self.pixels = found.values if len(found.values) else None
        self.broken = unreadable_rows(rows, found.broken)
        self._rows = _readable(rows, found.broken, self.broken, skip_broken, name)
        self.labels: list[int] = self._rows["label"][:]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.normalised(self.squashed(index)), "labels": self.labels[index]}

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of their numbers."""
        return list(self._rows.features["label"].names)

    def squashed(self, index: int) -> torch.Tensor:
        """Return the image resized to the square, uint8 [3, S, S]."""
        if self.pixels is not None:
            return self.pixels[index]
        return torch.from_numpy(squash(self.image(index), self.image_size, self.interpolation))

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 pixels [..., 3, S, S] as the model takes them, float32."""
        return normalise(pixels, self._mean, self._std)

    def mean_colour(self) -> tuple[int, ...]:
        """Return the colour that is zero after normalisation, 0..255 a channel."""
        return tuple(round(255 * value) for value in self._mean.flatten().tolist())

    @property
    def rows(self) -> datasets.Dataset:
        """The images as they are stored, without those left out."""
        return self._rows

    def image(self, index: int) -> Image.Image:
        """Return the image as stored: RGB, in its own size and shape."""
        return decode_row(self._rows[index])

    def source(self, index: int) -> str:
        """Return where the image comes from: a path, or a parquet file and the row in it."""
        return str(self._rows[index]["source"])


def _decode(rows: datasets.Dataset, side: int, interpolation: str, name: str) -> Pixels:
    """Decode every image, and keep the pixels if they fit into memory: none of them otherwise."""
    keep = len(rows) * 3 * side**2 <= MEMORY_LIMIT
    values = torch.empty(len(rows) if keep else 0, 3, side, side, dtype=torch.uint8)
    broken: dict[int, str] = {}
    for row, image in enumerate(decoded(rows, side, interpolation, name)):
        if isinstance(image, str):
            broken[row] = image
        elif keep:
            values[row - len(broken)] = torch.from_numpy(image)
    return Pixels(values[: len(rows) - len(broken)], broken)


def _readable(
    rows: datasets.Dataset, broken: dict[int, str], named: list[str], skip_broken: bool, name: str
) -> datasets.Dataset:
    """Drop the broken rows, or raise the error that names them."""
    if not broken:
        return rows
    if not skip_broken:
        raise DataError(
            f"{name}: {summary(named, len(rows))}. Repair or remove them, or leave them out with --skip-broken"
        )
    good = [index for index in range(len(rows)) if index not in broken]
    if not good:
        raise DataError(f"{name}: none of the {len(broken)} images can be read, for example {named[0]}")
    labels = rows["label"][:]
    lost = sorted(set(labels) - {labels[index] for index in good})
    if lost:
        classes = rows.features["label"].names
        raise DataError(
            f"{name}: no image of {', '.join(classes[label] for label in lost[:_NAMED])} can be read, for example "
            f"{named[0]}; a class that is left out would make the others look better"
        )
    return rows.select(good)
