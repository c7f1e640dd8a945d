"""The Pareto front against its definition."""

from __future__ import annotations

import random

import pytest

from pyra.tasks.reports import pareto_front


def brute_front(rows, speed):
    def beaten(row):
        return any(
            other.value >= row.value
            and speed(other) >= speed(row)
            and (other.value, speed(other)) != (row.value, speed(row))
            for other in rows
        )

    return [row for row in rows if not beaten(row)]


@pytest.mark.parametrize("measured", [True, False])
def test_front_against_brute_force_with_ties(measured, make):
    rng = random.Random(1)
    for size in [0, 1, 2, 5, 12] * 40:
        rows = [
            make(value=rng.randrange(4) / 4, speed=float(rng.randrange(4)), macs=rng.randrange(1, 5), seed=index)
            for index in range(size)
        ]
        if not measured and rows:
            rows[0] = make(value=rows[0].value, speed=None, macs=rows[0].macs, seed=0)
        speed = (lambda row: row.images_per_second) if measured else (lambda row: -row.macs)
        if not measured and not rows:
            continue
        front = pareto_front(rows)
        assert {row.seed for row in front} == {row.seed for row in brute_front(rows, speed)}
        assert [speed(row) for row in front] == sorted((speed(row) for row in front), reverse=True)


def test_front_keeps_equals_and_refuses_to_compare_tasks(rows, make):
    assert [row.method for row in pareto_front(rows)] == ["LoRA + ToMe", "LoRA + PYRA", "LoRA"]
    twins = [make("a"), make("b"), make("c", value=0.4)]
    assert [row.method for row in pareto_front(twins)] == ["a", "b"]
    with pytest.raises(ValueError, match="one task and metric"):
        pareto_front([make(), make(task="other")])


def test_lower_is_better_where_the_metric_says_so(make):
    rows = [make(name, value, speed, metric="rmse", higher_is_better=False) for name, value, speed in
            (("a", 0.2, 100.0), ("b", 0.5, 50.0), ("c", 0.1, 20.0))]  # fmt: skip
    assert [row.method for row in pareto_front(rows)] == ["a", "c"]
