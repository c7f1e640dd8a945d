"""Results as a table of two dimensions, with the averages of a suite; nothing is averaged that differs in more."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyra.errors import ConfigError, did_you_mean
from pyra.tasks.data.cards import TaskCard, suite_cards, suite_folders
from pyra.tasks.reports.formats import Table
from pyra.tasks.reports.groups import Group, differences, shown
from pyra.tasks.reports.table import metric_name, value_text

DIMENSIONS = ("task", "method", "rate", "backbone", "seed", "protocol")
_SPLIT_BY = ("task", "method", "rate", "backbone", "protocol")


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation over seeds."""

    metric: str
    mean: float
    deviation: float | None
    seeds: Sequence[int]
    higher_is_better: bool = True


@dataclass
class Pivot:
    """Cells by the labels of their row and column, in the order they are shown in; and what has to be said."""

    dimensions: tuple[str, str]
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Return the cells as people read them."""
        metrics = {_metric(cell) for cell in self.cells.values()}
        named = len(metrics) > 1
        header = self.dimensions[0] if named or not metrics else f"{self.dimensions[0]}: {metrics.pop()}"
        lines = [[row, *(self._text(row, column, named) for column in self.columns)] for row in self.rows]
        bare = self.dimensions[1] if self.dimensions[1] in ("rate", "seed") else ""
        columns = [f"{bare} {column}" if bare and column[:1].isdigit() else column for column in self.columns]
        return Table([header, *columns], lines)

    def _text(self, row: str, column: str, named: bool) -> str:
        cell = self.cells.get((row, column))
        if cell is None:
            return "-"
        return f"{_metric(cell)} " * named + value_text(cell.metric, cell.mean, cell.deviation)

    def records(self) -> list[dict[str, Any]]:
        """Return a record a cell, with full precision."""
        return [
            {
                self.dimensions[0]: row,
                self.dimensions[1]: column,
                "metric": cell.metric,
                "higher_is_better": cell.higher_is_better,
                "value_mean": cell.mean,
                "value_std": cell.deviation,
                "seeds": list(cell.seeds),
            }
            for row in self.rows
            for column in self.columns
            if (cell := self.cells.get((row, column))) is not None
        ]


def dimensions(text: str) -> tuple[str, str]:
    """Read ``rows,columns``.

    Raises:
        ConfigError: for anything but two different names of :data:`DIMENSIONS`.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [f"{name!r}{did_you_mean(name, DIMENSIONS)}" for name in names if name not in DIMENSIONS]
    if unknown:
        raise ConfigError(f"--pivot: unknown {', '.join(unknown)}; give two of {', '.join(DIMENSIONS)}")
    if len(names) != 2 or names[0] == names[1]:
        raise ConfigError(f"--pivot {text}: give two different names (rows,columns) of {', '.join(DIMENSIONS)}")
    return names[0], names[1]


def pivot(groups: Sequence[Group], across: tuple[str, str]) -> Pivot:
    """Lay groups out by two dimensions.

    Where runs of one label differ in more than the two dimensions say, the label is split and says in what. With tasks
    as one dimension the averages of their suite follow, where every task of it is there.

    Args:
        groups: one seed each where ``seed`` is a dimension.
        across: the dimension of the rows and that of the columns.
    """
    split_axis = 0 if across[1] == "task" else 1
    other = across[1 - split_axis]
    places = sorted(
        zip(groups, _labels(groups, across[split_axis], other), strict=True), key=lambda one: _order(one[0])
    )
    cells: dict[tuple[str, str], Cell] = {}
    for one, label in places:
        pair = (label, _label(one, other))
        cells[pair if split_axis == 0 else pair[::-1]] = Cell(
            one.row.metric, one.mean, one.deviation, one.seeds, one.row.higher_is_better
        )
    axes = []
    for axis, name in enumerate(across):
        keys = {(label if axis == split_axis else _label(one, other)): _key(one, name) for one, label in places}
        axes.append(sorted(keys, key=lambda label: (keys[label], label)))
    made = Pivot(across, axes[0], axes[1], cells)
    if other == "task":
        _add_averages(made, places, 1 - split_axis)
    return made


def _label(one: Group, name: str) -> str:
    if one.baseline and name not in ("task", "method"):
        return one.row.method
    text = shown(one, name)
    return text if name != "task" or one.row.split == "test" else f"{text} ({one.row.split})"


def _labels(groups: Sequence[Group], name: str, other: str) -> list[str]:
    """Label groups along the split axis so that no two of them share a cell."""
    labels = [_label(one, name) for one in groups]
    for label in set(labels):
        same = [index for index, text in enumerate(labels) if text == label]
        for attribute in _SPLIT_BY:
            if attribute in (name, other):
                continue
            told = _differ([groups[i] for i in same], attribute, other)
            for index in same:
                # A number that was chosen on the test split says so wherever it stands.
                if told or (attribute == "protocol" and groups[index].row.protocol == "published"):
                    said = shown(groups[index], attribute)
                    labels[index] += f", {attribute} {said}" if attribute == "rate" else f", {said}"
    taken: dict[tuple[str, str], list[int]] = {}
    for index, one in enumerate(groups):
        taken.setdefault((labels[index], _label(one, other)), []).append(index)
    for indices in taken.values():
        if len(indices) > 1:
            texts = differences([groups[index] for index in indices], by_seed="seed" in (name, other))
            for number, (index, text) in enumerate(zip(indices, texts, strict=True), start=1):
                labels[index] += f" ({text or number})"
    return labels


def _differ(groups: Sequence[Group], attribute: str, other: str) -> bool:
    """Whether groups of one label differ: at all where the other axis is the tasks, else within one cell."""
    seen: dict[str, set[str]] = {}
    for one in groups:
        seen.setdefault("" if other == "task" else _label(one, other), set()).add(shown(one, attribute))
    return any(len(values) > 1 for values in seen.values())


def _key(one: Group, name: str) -> tuple[Any, ...]:
    row = one.row
    first = (not one.baseline, row.method != "linear") if name != "task" else ()
    if name in ("rate", "seed"):
        return (not one.baseline, getattr(row, name))
    return (*first, shown(one, name))


def _order(one: Group) -> tuple[Any, ...]:
    return (one.row.task, not one.baseline, one.row.method, one.row.rate, one.seeds)


def _add_averages(made: Pivot, places: Iterable[tuple[Group, str]], task_axis: int) -> None:
    """Add both averages of each suite along the axis of the tasks."""
    columns: dict[str, dict[str, Group]] = {}
    for one, label in places:
        if one.row.split == "test":
            columns.setdefault(label, {})[one.row.task] = one
    axis = (made.rows, made.columns)[task_axis]
    for suite in suite_folders():
        cards = suite_cards(suite)
        names = (
            f"{suite}: mean of {len({card.group for card in cards})} groups",
            f"{suite}: mean of {len(cards)} tasks",
        )
        lacking, complete = [], False
        for label, tasks in sorted(columns.items()):
            there = [card for card in cards if card.name in tasks]
            if not there:
                continue
            if len(there) < len(cards):
                if not any(one.baseline for one in tasks.values()):
                    lacking.append(f"{label} lacks {len(cards) - len(there)} of {len(cards)} tasks")
                continue
            averages = _averages(cards, tasks)
            if averages is None:
                lacking.append(f"{label} has several metrics")
                continue
            complete = True
            for name, cell in zip(names, averages, strict=True):
                made.cells[(name, label) if task_axis == 0 else (label, name)] = cell
        if complete:
            axis.extend(names)
        if lacking:
            made.notes.append(f"no average of {suite}: {', '.join(lacking)}")


def _averages(cards: Sequence[TaskCard], tasks: dict[str, Group]) -> tuple[Cell, Cell] | None:
    """Return the mean of the group means and the mean of the tasks, or None where the tasks have several metrics.

    Their deviation over seeds is known where all tasks have the same seeds.
    """
    if len({(tasks[card.name].row.metric, tasks[card.name].row.higher_is_better) for card in cards}) > 1:
        return None
    first = tasks[cards[0].name]
    seeds = first.seeds if all(tasks[card.name].draws == first.draws for card in cards) else []
    of_seeds = [{card.name: tasks[card.name].rows[index].value for card in cards} for index in range(len(seeds))]
    means = {card.name: tasks[card.name].mean for card in cards}
    cells = []
    for average in (_mean_of_groups, _mean_of_tasks):
        values = [average(cards, one) for one in of_seeds]
        deviation = float(statistics.stdev(values)) if len(values) > 1 else None
        cells.append(Cell(first.row.metric, average(cards, means), deviation, seeds, first.row.higher_is_better))
    return cells[0], cells[1]


def _mean_of_groups(cards: Sequence[TaskCard], values: dict[str, float]) -> float:
    groups: dict[str, list[float]] = {}
    for card in cards:
        groups.setdefault(card.group, []).append(values[card.name])
    return float(statistics.mean(statistics.mean(one) for one in groups.values()))


def _mean_of_tasks(cards: Sequence[TaskCard], values: dict[str, float]) -> float:
    return float(statistics.mean(values[card.name] for card in cards))


def _metric(cell: Cell) -> str:
    return metric_name(cell.metric) + ("" if cell.higher_is_better else " ↓")
