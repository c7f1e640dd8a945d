"""Draws of images by class with a seed of their own: the same on every machine, whatever else was drawn before."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence


def rows_by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    """Return the row numbers of each class, in order of class and row."""
    found: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        found[label].append(row)
    return dict(sorted(found.items()))


def few_of_each(labels: Sequence[int], count: int, seed: int, stream: str) -> list[int]:
    """Return the rows of ``count`` images a class, or of all where a class has fewer, in their order.

    A smaller count gives a part of what a larger one gives.

    Args:
        labels: class of each row.
        count: images a class.
        seed: of the draw.
        stream: tells draws of one seed apart, such as the name of the split.
    """
    chosen = []
    for label, rows in rows_by_class(labels).items():
        chosen += _shuffled(rows, seed, f"{stream}/{label}")[:count]
    return sorted(chosen)


def stratified(labels: Sequence[int], counts: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """Divide rows into parts of given sizes that have no row in common, each with the shares of the classes of all.

    The first part has an image of every class, as long as it is large enough.

    Raises:
        ValueError: where there are fewer rows than are asked for.

    >>> parts = stratified([0] * 6 + [1] * 3, {"train": 3, "val": 3}, seed=0)
    >>> [sum(row < 6 for row in rows) for rows in parts.values()]
    [2, 2]
    """
    if sum(counts.values()) > len(labels):
        raise ValueError(f"{sum(counts.values())} images are needed, there are {len(labels)}")
    left = {label: _shuffled(rows, seed, str(label)) for label, rows in rows_by_class(labels).items()}
    shares = {label: len(rows) / len(labels) for label, rows in left.items()}
    parts: dict[str, list[int]] = {}
    for name, count in counts.items():
        least = 1 if not parts and count >= len(left) else 0
        taken = _allotted({label: len(rows) for label, rows in left.items()}, shares, count, least, seed)
        parts[name] = sorted(row for label, rows in left.items() for row in rows[: taken[label]])
        left = {label: rows[taken[label] :] for label, rows in left.items()}
    return parts


def _allotted(
    there: Mapping[int, int], shares: Mapping[int, float], count: int, least: int, seed: int
) -> dict[int, int]:
    """Say how many images each class gives: its share of ``count``, as near as whole numbers come."""
    wanted = {label: count * share for label, share in shares.items()}
    given = {label: min(there[label], max(least, math.floor(wanted[label]))) for label in there}
    order = _shuffled(list(there), seed, "order")  # among classes of equal need; by number, the first would always win
    while sum(given.values()) < count:
        label = max((one for one in order if given[one] < there[one]), key=lambda one: wanted[one] - given[one])
        given[label] += 1
    while sum(given.values()) > count:  # what `least` gave too much
        label = max((one for one in order if given[one] > least), key=lambda one: given[one] - wanted[one])
        given[label] -= 1
    return given


def _shuffled(values: Sequence[int], seed: int, stream: str) -> list[int]:
    shuffled = list(values)
    random.Random(f"{seed}/{stream}").shuffle(shuffled)  # a text seeds by its SHA-512: no seed is near another
    return shuffled
