"""Paired differences between methods that were scored on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Right = NDArray[np.float32]
"""Which images of a split are classified right, 1 or 0 an image."""


@dataclass(frozen=True)
class Difference:
    """Means of two methods and of their difference, with its interval: fractions, not percentage points."""

    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    spread_of_ours: float
    spread_of_theirs: float

    def points(self) -> dict[str, float]:
        """Return all of it in percentage points."""
        return {name.replace("_", " "): round(100 * value, 4) for name, value in vars(self).items()}


def paired_difference(
    ours: Sequence[Right], theirs: Sequence[Right], *, draws: int = 5000, level: float = 0.95
) -> Difference:
    """Compare two methods, each run with the same seeds and scored on the same images.

    The interval is a percentile bootstrap over seeds and images together: each draw takes as many of both as there
    are, with replacement, and the same images for every seed. Spreads are standard deviations over seeds, 0 for one.

    Args:
        ours: one entry a seed, each [images].
        theirs: the same, in the same order.
        draws: of the bootstrap; their random numbers are always the same.
        level: of the interval.

    Raises:
        ValueError: where the two are not of one shape, hold no image or values that are no number, or ``draws`` or
            ``level`` make no interval.
    """
    left, right = _pairs(ours, theirs)
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"paired_difference: draws must be positive and level in (0, 1), got {draws} and {level}")
    drawn = _drawn(left - right, draws)
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    spreads = [float(one.mean(1).std(ddof=1)) if len(left) > 1 else 0.0 for one in (left, right)]
    return Difference(
        float(left.mean()), float(right.mean()), float((left - right).mean()), float(low), float(high), *spreads
    )


def probability_at_least(
    ours: Sequence[Right], theirs: Sequence[Right], difference: float, *, draws: int = 5000
) -> float:
    """Return in what share of the draws of :func:`paired_difference` ``ours - theirs`` is at least ``difference``.

    >>> right, wrong = np.ones(10, np.float32), np.zeros(10, np.float32)
    >>> probability_at_least([wrong], [right], -1.0), probability_at_least([wrong], [right], -0.5)
    (1.0, 0.0)
    """
    left, right = _pairs(ours, theirs)
    return float((_drawn(left - right, draws) >= difference - 1e-9).mean())


def _drawn(difference: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Return the mean of ``difference`` [seeds, images] in each draw, the same ones at every call."""
    random, (seeds, images) = np.random.default_rng(0), difference.shape
    return np.array(
        [
            difference[random.integers(seeds, size=seeds)].mean(0)[random.integers(images, size=images)].mean()
            for _ in range(draws)
        ]
    )


def _pairs(ours: Sequence[Right], theirs: Sequence[Right]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both sides as [seeds, images] after checking that they are pairs."""
    shapes = [sorted({np.shape(one) for one in side}) for side in (ours, theirs)]
    if len(ours) != len(theirs) or shapes[0] != shapes[1] or len(shapes[0]) != 1 or len(shapes[0][0]) != 1:
        counts = f"{len(ours)} and {len(theirs)} seeds of {shapes[0]} and {shapes[1]} images"
        raise ValueError(f"paired_difference: {counts} are no pairs")
    left, right = np.stack(ours).astype(np.float64), np.stack(theirs).astype(np.float64)
    if not left.size or not np.isfinite(left).all() or not np.isfinite(right).all():
        raise ValueError("paired_difference: there is no image, or a value that is no number")
    return left, right
