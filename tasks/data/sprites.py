"""dSprites, drawn: white shapes on black, 64 x 64, each from six factors (github.com/google-deepmind/dsprites-dataset).

The factors and their values are the published ones: 3 shapes x 6 scales (0.5 to 1) x 40 orientations (0 to 2 pi, both
ends included, so the last equals the first) x 32 x 32 positions. The outlines are our own, so pixels differ from the
published file at the edges, and the draw of a split is our own as well: results compare among themselves.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
SHAPES: tuple[str, ...] = ("square", "ellipse", "heart")
SIZES: dict[str, int] = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
COUNT = int(np.prod(list(SIZES.values())))
CLASSES = 16
"""Orientations (40) and positions (32) are binned into as many classes, as VTAB does (arXiv 1910.04867)."""

_SUPERSAMPLED = 4  # points a pixel along each side; a pixel is white where most of them are inside
_RADIUS = 11.0  # of the largest shape, in pixels
_WINDOW = SIDE - SIZES["x"] + 1  # pixels a side that hold any shape


def draw_split(count: int, seed: int, skip: int = 0) -> NDArray[np.int64]:
    """Return ``count`` different images of the 737,280, by number, without the first ``skip`` of the seed's order.

    Splits of one seed that follow each other have no image in common.

    Raises:
        ValueError: where there are not as many.
    """
    if count < 0 or skip < 0 or skip + count > COUNT:
        raise ValueError(f"dSprites has {COUNT} images, asked for {skip} to {skip + count}")
    # A permutation by ranks of random words is the same on every platform and with every release of numpy's shuffle.
    order = np.argsort(np.random.Generator(np.random.PCG64(seed)).integers(2**63, size=COUNT), kind="stable")
    return order[skip : skip + count].astype(np.int64)


def factors(numbers: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the factors [n] of images [n]; the last factor counts fastest, as published."""
    found, rest = {}, numbers
    for name, size in reversed(SIZES.items()):
        found[name], rest = rest % size, rest // size
    return {name: found[name] for name in SIZES}


def labels(numbers: NDArray[np.int64], factor: str) -> NDArray[np.int64]:
    """Return the class [n], 0 to 15, of images [n]: of their ``"orientation"`` or their position ``"x"``."""
    return factors(numbers)[factor] * CLASSES // SIZES[factor]


def render(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Draw images [n]: uint8 [n, 64, 64], 0 or 255."""
    known = factors(numbers)
    sprites = _sprites()
    images = np.zeros((len(numbers), SIDE, SIDE), dtype=np.uint8)
    for image, shape, scale, orientation, x, y in zip(images, *known.values(), strict=True):
        image[y : y + _WINDOW, x : x + _WINDOW] = sprites[shape, scale, orientation]
    return images


def encoded(numbers: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield images as PNG files: one bit a pixel, stored uncompressed, so that no library changes their bytes."""
    for start in range(0, len(numbers), 64):
        for pixels in render(numbers[start : start + 64]):
            file = io.BytesIO()
            Image.fromarray(pixels).convert("1").save(file, "png", compress_level=0)
            yield file.getvalue()


@functools.cache
def _sprites() -> NDArray[np.uint8]:
    """[3, 6, 40, W, W]: each shape in each size and orientation, in the middle of a window.

    Positions are one pixel apart, so that an image is a window in its place.
    """
    points = (np.arange(_WINDOW * _SUPERSAMPLED) + 0.5) / _SUPERSAMPLED - _WINDOW / 2
    across, down = points[None, :], points[:, None]
    made = np.zeros((SIZES["shape"], SIZES["scale"], SIZES["orientation"], _WINDOW, _WINDOW), dtype=np.uint8)
    for scale in range(SIZES["scale"]):
        unit = _RADIUS * (0.5 + 0.5 * scale / (SIZES["scale"] - 1))
        for orientation in range(SIZES["orientation"]):
            angle = 2 * np.pi * (orientation % (SIZES["orientation"] - 1)) / (SIZES["orientation"] - 1)
            cos, sin = np.cos(angle) / unit, np.sin(angle) / unit
            right, up = across * cos + down * sin, across * sin - down * cos
            for shape, outline in enumerate((_square, _ellipse, _heart)):
                inside = outline(right, up).reshape(_WINDOW, _SUPERSAMPLED, _WINDOW, _SUPERSAMPLED)
                made[shape, scale, orientation] = np.where(inside.mean((1, 3)) >= 0.5, 255, 0)
    return made


def _square(right: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(np.abs(right), np.abs(up)) <= 0.7


def _ellipse(right: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.bool_]:
    return right**2 + (up / 0.55) ** 2 <= 0.95


def _heart(right: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.bool_]:
    x, y = right * 1.25, up * 1.25 + 0.1
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0
