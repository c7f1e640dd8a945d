"""Where the labels of a plot go: beside their points, never on each other. All lengths are pixels, y downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Pair = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_STEPS = (1.0, 0.5, 0.0, -0.5, -1.0)
# Ways from a point to its label, on the edge of a square; straight right, below, above and left come first.
_WAYS = np.array(
    sorted(
        [(x, y) for x in _STEPS for y in _STEPS if max(abs(x), abs(y)) == 1], key=lambda way: abs(way[0]) + abs(way[1])
    )
)
_RINGS = np.arange(0.0, 320.0, 7.0)
_ON_LINE, _CROSSING = 25.0, 40.0  # the extra distance that covering a line, or leading across a thing, is worth


def place_labels(
    points: Sequence[Pair], radii: Sequence[float], sizes: Sequence[Pair], bounds: Box, lines: Sequence[Box] = ()
) -> list[Box | None]:
    """Place one label beside each point so that no two labels overlap and none covers a point or leaves ``bounds``.

    Every label takes the nearest free place; covering one of ``lines`` (vertical or horizontal, as boxes) or leading
    a line from point to label across something else counts as extra distance. Labels of crowded points are placed
    first; one that fits nowhere is None.
    """
    placed: list[Box | None] = [None] * len(points)
    taken = [(x - r - 2, y - r - 2, x + r + 2, y + r + 2) for (x, y), r in zip(points, radii, strict=True)]
    segments = np.array(lines, dtype=float).reshape(-1, 4)
    crowding = [sum(1 / (1 + math.dist(point, other)) for other in points) for point in points]
    for index in sorted(range(len(points)), key=crowding.__getitem__, reverse=True):
        point, things, gap = np.array(points[index]), np.array(taken), radii[index] + 4
        places = _places(point, gap, np.array(sizes[index]), np.array(bounds))
        places = places[~_touching(places, things).any(1)]
        if not len(places):
            continue
        distance = np.hypot(*(np.clip(point, places[:, :2], places[:, 2:]) - point).T)
        on_lines = _touching(places, segments).sum(1)
        crossings = _touching(_leaders(point, places), np.delete(things, index, axis=0)).any(0).sum(-1)
        cost = distance.clip(gap) + _ON_LINE * on_lines + _CROSSING * crossings
        left, top, right, bottom = places[cost.round(3).argmin()].tolist()
        placed[index] = (left, top, right, bottom)
        taken.append((left, top, right, bottom))
    return placed


def _places(
    point: npt.NDArray[np.float64], gap: float, size: npt.NDArray[np.float64], bounds: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return places [P, 4] for a label in rings around its point, moved into ``bounds``; none where it is too large."""
    low, high = bounds[:2] + size / 2, bounds[2:] - size / 2
    if (low > high).any():
        return np.empty((0, 4))
    centres = point + _WAYS * (gap + _RINGS[:, None, None] + size / 2)
    centres = centres.reshape(-1, 2).clip(low, high)
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _leaders(point: npt.NDArray[np.float64], places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return points on the way to the centre of each place, as empty boxes [S, P, 4]."""
    centres = (places[:, :2] + places[:, 2:]) / 2
    steps = point + np.linspace(0.1, 1, 10)[:, None, None] * (centres - point)
    return np.concatenate([steps, steps], axis=-1)


def _touching(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which boxes [..., 4] touch which boxes [K, 4], as [..., K]."""
    a = a[..., None, :]
    touch: npt.NDArray[np.bool_] = np.all((a[..., :2] <= b[:, 2:]) & (b[:, :2] <= a[..., 2:]), axis=-1)
    return touch
