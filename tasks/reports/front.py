"""The Pareto front: the results that no other result beats."""

from __future__ import annotations

from collections.abc import Sequence

from pyra.tasks.results import RunResult


def pareto_front(rows: Sequence[RunResult]) -> list[RunResult]:
    """Return the rows that no other row beats, fastest first (cheapest first where MACs stand in for speed).

    A row is beaten by one at least as good in value and in speed and better in one of them. Speed is images/s where
    every row measured it, otherwise fewer MACs. Rows that tie in both all stay, in their given order.

    Raises:
        ValueError: rows of several tasks or metrics, which cannot be compared.
    """
    return [rows[index] for index in front_indices(rows)]


def front_indices(rows: Sequence[RunResult]) -> list[int]:
    """Return the places in ``rows`` of :func:`pareto_front`."""
    compared = sorted({(row.task, row.metric) for row in rows})
    if len(compared) > 1:
        raise ValueError(f"a front needs rows of one task and metric, these are {compared}")
    timed = all_timed(rows)
    points = [
        ((row.images_per_second or 0.0) if timed else -row.macs, row.value if row.higher_is_better else -row.value)
        for row in rows
    ]
    front = [
        index
        for index, (speed, value) in enumerate(points)
        if not any(s >= speed and v >= value and (s, v) != (speed, value) for s, v in points)
    ]
    return sorted(front, key=lambda index: -points[index][0])


def all_timed(rows: Sequence[RunResult]) -> bool:
    """Whether every row measured its images/s, so that speed is compared rather than MACs."""
    return all(row.images_per_second is not None for row in rows)
