"""The Pareto front: the results that no other result beats."""

from __future__ import annotations

from collections.abc import Sequence

from pyra.tasks.reports.groups import Group, differences
from pyra.tasks.reports.table import number_text, value_text
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
    return front_places(points)


def front_places(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the pairs that no other pair beats, highest first number first; more of both is better.

    >>> front_places([(1, 5), (2, 3), (1, 4), (2, 3), (2, 2)])
    [1, 3, 0]
    """
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def all_timed(rows: Sequence[RunResult]) -> bool:
    """Whether every row measured its images/s, so that speed is compared rather than MACs."""
    return all(row.images_per_second is not None for row in rows)


def tokens_notes(groups: Sequence[Group]) -> list[str]:
    """Name for each task, answered by several ways, those that no other beats on these examples with fewer tokens."""
    ways: dict[tuple[str, str, str | None], list[tuple[Group, float, str]]] = {}
    for one, different in zip(groups, differences(groups), strict=True):
        tokens = None if one.baseline else one.average("answer_tokens")
        if tokens is not None:
            ways.setdefault((one.row.task, one.row.metric, one.row.test_sha256), []).append((one, tokens, different))
    notes = []
    for (task, _, _), found in ways.items():
        if len({tokens for _, tokens, _ in found}) < 2:
            continue
        points = [(-tokens, one.mean if one.row.higher_is_better else -one.mean) for one, tokens, _ in found]
        named = [_way(*found[place]) for place in front_places(points)]
        notes.append(f"{task}, no other answers better with as few tokens: {'; '.join(named)}")
    return notes


def _way(one: Group, tokens: float, different: str) -> str:
    name = f"{one.row.method} ({different})" if different else one.row.method
    return f"{name}, {value_text(one.row.metric, one.mean)} with {number_text(tokens)} tokens"
