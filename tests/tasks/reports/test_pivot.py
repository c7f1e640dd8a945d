"""Two dimensions, and the averages of a suite."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.tasks.data.cards import suite_cards
from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.groups import group, majority_groups
from pyra.tasks.reports.pivot import Pivot, dimensions, pivot

CARDS = suite_cards("vtab-1k")


def laid_out(text: str, *rows) -> Pivot:
    across = dimensions(text)
    groups, _ = group([Found(Path(str(i)) / "result.json", row) for i, row in enumerate(rows)], "seed" in across)
    return pivot([*majority_groups(groups), *groups], across)


def texts(made: Pivot) -> list[list[str]]:
    table = made.table()
    return [list(table.headers), *map(list, table.cells)]


def test_tasks_by_methods_with_the_baselines_first(make) -> None:
    rows = [make(value=0.6 + seed / 100, seed=seed, rate=0.7, majority_value=0.1) for seed in range(3)]
    made = laid_out("task,method", *rows, make("linear", 0.4), make("adapter", 0.5, task="other"))
    assert texts(made) == [
        ["task: top-1 (%)", "majority class", "linear", "adapter", "pyra"],
        ["demo", "10.0", "40.0", "-", "61.0 ± 1.0"],
        ["other", "-", "-", "50.0", "-"],
    ]
    turned = laid_out("method,task", *rows, make("linear", 0.4), make("adapter", 0.5, task="other"))
    assert turned.rows == made.columns and turned.columns == made.rows
    assert {(b, a): cell for (a, b), cell in made.cells.items()} == turned.cells


def test_methods_that_differ_in_rate_or_settings_are_not_averaged(make) -> None:
    made = laid_out("task,method", make(rate=0.5, value=0.7), make(rate=0.7, value=0.6), make("lora", 0.8))
    assert texts(made) == [
        ["task: top-1 (%)", "lora", "pyra, rate 0.50", "pyra, rate 0.70"],
        ["demo", "80.0", "70.0", "60.0"],
    ]
    made = laid_out("task,method", *(make(settings={"lr": lr}, value=lr) for lr in (0.1, 0.2)))
    assert texts(made)[0][1:] == ["pyra (lr=0.1)", "pyra (lr=0.2)"]


def test_seeds_rates_and_several_tasks(make) -> None:
    rows = [
        make(method, 0.5, seed=seed, task=task) for method in ("a", "b") for seed in (0, 10, 9) for task in ("x", "y")
    ]
    made = laid_out("method,seed", *rows)
    assert made.columns == ["0, x", "0, y", "9, x", "9, y", "10, x", "10, y"]
    assert made.table().headers[1] == "seed 0, x"
    assert len(made.cells) == 12
    assert laid_out("method,rate", make(rate=0.5), make(rate=0.25)).columns == ["0.25", "0.50"]


def test_chosen_on_the_test_split_is_said_in_every_layout(make) -> None:
    rows = [make(protocol="published"), make("lora", protocol="validation")]
    for text in ("task,method", "method,task", "task,rate", "backbone,rate", "seed,task", "method,protocol"):
        made = laid_out(text, *rows)
        said = [label for label in [*made.rows, *made.columns] if "chosen on the test split" in label]
        assert len(said) == 1, text


def test_metrics_and_their_directions_are_named_where_they_differ(make) -> None:
    made = laid_out("task,method", make(), make(task="x", metric="rmse", value=1e12, higher_is_better=False))
    assert [line[1] for line in texts(made)[1:]] == ["top-1 (%) 50.0", "rmse ↓ 1.000e+12"]


def full(make, method: str = "pyra", seeds: int = 2, leave: int = 0):
    return [
        make(method, (index + seed) / 100, task=card.name, seed=seed)
        for index, card in enumerate(CARDS[leave:])
        for seed in range(seeds)
    ]


def test_both_averages_of_a_full_suite_with_their_deviation(make) -> None:
    made = laid_out("task,method", *full(make))
    groups = made.cells["vtab-1k: mean of 3 groups", "pyra"]
    tasks = made.cells["vtab-1k: mean of 19 tasks", "pyra"]
    values = {card.name: (index + 0.5) / 100 for index, card in enumerate(CARDS)}
    of_groups = [
        statistics.mean(values[card.name] for card in CARDS if card.group == name)
        for name in ("natural", "specialized", "structured")
    ]
    assert groups.mean == pytest.approx(statistics.mean(of_groups))
    assert tasks.mean == pytest.approx(statistics.mean(values.values())) != groups.mean
    assert groups.deviation == pytest.approx(statistics.stdev([0, 0.01])) == pytest.approx(tasks.deviation)
    assert made.rows[-2:] == ["vtab-1k: mean of 3 groups", "vtab-1k: mean of 19 tasks"] and made.notes == []
    assert laid_out("method,task", *full(make)).columns[-1] == "vtab-1k: mean of 19 tasks"


def test_an_incomplete_suite_has_no_average_and_says_so(make) -> None:
    made = laid_out("task,method", *full(make, "lora", leave=2), *full(make)[:-2])
    assert len(made.rows) == 19
    assert made.notes == ["no average of vtab-1k: lora lacks 2 of 19 tasks, pyra lacks 1 of 19 tasks"]
    both = laid_out("task,method", *full(make, "lora", leave=2), *full(make))
    assert ("vtab-1k: mean of 19 tasks", "pyra") in both.cells
    assert ("vtab-1k: mean of 19 tasks", "lora") not in both.cells
    assert both.notes == ["no average of vtab-1k: lora lacks 2 of 19 tasks"]
    assert laid_out("method,rate", *full(make)).notes == []


def test_an_average_never_mixes_rates_protocols_or_metrics(make) -> None:
    rows = full(make, seeds=1)
    for change in ({"rate": 0.3}, {"protocol": "published"}, {"backbone": "other"}, {"split": "validation"}):
        changed = [make("pyra", 0.5, task=CARDS[0].name, **change), *rows[1:]]
        made = laid_out("task,method", *changed)
        assert not any("mean" in label for label in made.rows) and made.notes, change
    changed = [make("pyra", 0.5, task=CARDS[0].name, metric="f1"), *rows[1:]]
    assert laid_out("task,method", *changed).notes == ["no average of vtab-1k: pyra has several metrics"]


def test_seeds_that_differ_between_tasks_give_no_deviation(make) -> None:
    made = laid_out("task,method", *full(make)[:-1])
    assert made.cells["vtab-1k: mean of 19 tasks", "pyra"].deviation is None


@pytest.mark.parametrize("text", ["task", "task,task", "task,method,rate", "", "task,methd"])
def test_dimensions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--pivot"):
        dimensions(text)
    with pytest.raises(ConfigError, match="did you mean 'method'"):
        dimensions("task,methd")
