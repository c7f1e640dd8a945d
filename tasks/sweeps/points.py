"""The points of a sweep: runs that differ in their seed only, with what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyra.tasks.reports.groups import Group, seeds_text, shown
from pyra.tasks.reports.summary import value_cell, value_header
from pyra.tasks.reports.table import macs_unit, number_text
from pyra.tasks.results import RunResult, evaluated_rate

_STEADY = 1.3  # times between the speeds of one model


@dataclass(frozen=True)
class Cost:
    """One way to count what a point costs: its column, the title of its axis, and which direction is better."""

    key: str
    title: str
    higher: bool
    better: str
    of: Callable[[Point], float | None]

    @property
    def axis(self) -> str:
        """The title with the better direction, which is drawn to the right."""
        return f"{self.title}, {self.better} →"


@dataclass(frozen=True)
class Point:
    """A group of runs with the means of what was measured; a speed of several devices or batches has no mean.

    ``told`` says how it differs from points of the same method and rate, where there are any.
    """

    group: Group
    speed: float | None
    speedup: float | None
    macs: float
    parameters: float
    memory: float | None
    told: str = ""

    @property
    def row(self) -> RunResult:
        """The first run: what all of them share is its."""
        return self.group.row

    @property
    def name(self) -> str:
        """Method and rate, as plots call it."""
        text = f"{self.row.method} {self.row.rate:.2f}" if self.compressed else self.row.method
        return f"{text} ({self.told})" if self.told else text

    @property
    def compressed(self) -> bool:
        """Whether tokens merge."""
        return self.row.rate > 0

    @property
    def run(self) -> Path:
        """Folder of the first run: the best of the seeds would be chosen by its test score."""
        return self.group.members[0].file.parent

    @property
    def asked_rate(self) -> float | None:
        """The rate to set on the run's model, where that is not its own: of an elastic run."""
        return evaluated_rate(self.group.members[0].file)

    @property
    def context(self) -> tuple[str, str, str]:
        """What is compared with each other: task, split and metric."""
        return self.row.task, self.row.split, self.row.metric

    @property
    def mean_row(self) -> RunResult:
        """The point as one row: the means in the place of what the first run measured."""
        return replace(self.row, value=self.group.mean, images_per_second=self.speed, speedup=self.speedup)


def point(one: Group, told: str = "") -> Point:
    """Average a group, and call it what :func:`pyra.tasks.reports.groups.differences` says of it."""
    return Point(
        one,
        one.average("images_per_second") if len(one.devices()) == 1 else None,
        one.average("speedup"),
        one.average("macs") or 0.0,
        one.average("trained_parameters") or 0.0,
        one.average("peak_memory_bytes"),
        told,
    )


def costs(points: Sequence[Point]) -> list[Cost]:
    """Return every way to count costs, in units that suit these points."""
    unit, size = macs_unit([one.row for one in points])
    ways = [
        Cost("speed", speed_title(points), True, "faster", lambda one: one.speed),
        Cost("speedup", "speed-up over the unmerged backbone (x)", True, "faster", lambda one: one.speedup),
        Cost("macs", f"MACs of one input ({unit})", False, "fewer", lambda one: one.macs / size),
        Cost("parameters", "trained parameters", False, "fewer", lambda one: one.parameters),
        Cost("memory", "peak memory of the run (GB)", False, "less", lambda one: one.memory and one.memory / 1e9),
    ]
    if len(plain_speeds(points)) == 1:  # of one model, speed-ups say the same and are measured in turns
        ways[:2] = ways[1::-1]
    return ways


def speed_title(points: Sequence[Point]) -> str:
    """Return what was counted in a second, with the batch where all have the same one."""
    units = {one.row.unit for one in points}
    batches = {batch for one in points for _, batch in one.group.devices()}
    unit = f"{units.pop()}/s" if len(units) == 1 else "inputs/s"
    return f"{unit} (batch {batches.pop()})" if len(batches) == 1 and None not in batches else unit


@dataclass(frozen=True)
class Column:
    """Texts of one property of the points; ``key`` is by what a page sorts it."""

    key: str
    header: str
    cells: list[str]
    left: bool = False


def columns(points: Sequence[Point]) -> list[Column]:
    """Return the columns of the table; what is the same for all points stands in none."""
    groups = [one.group for one in points]
    made = [Column("method", "method", [one.row.method for one in points], left=True)]
    for name in ("task", "split", "backbone", "protocol"):
        texts = [shown(one, name) for one in groups]
        if len(set(texts)) > 1 or any("chosen on the test split" in text for text in texts):
            made.append(Column(name, name, texts, left=True))
    different = [one.told for one in points]
    if any(different):
        made.append(Column("with", "with", different, left=True))
    header, named = value_header(groups)
    unit, size = macs_unit([one.row for one in points])
    memory = [None if one.memory is None else one.memory / 1e9 for one in points]
    made += [
        Column("rate", "rate", [shown(one, "rate") for one in groups]),
        Column("value", header, [value_cell(one, named) for one in groups]),
        Column("speedup", "speed-up", ["-" if one.speedup is None else f"{one.speedup:.2f}x" for one in points]),
        Column("speed", speed_title(points), [number_text(one.speed) for one in points]),
        Column("macs", f"MACs ({unit})", [number_text(one.macs / size) for one in points]),
        Column("seeds", "seeds", [seeds_text(one) for one in groups]),
        Column("parameters", "trained parameters", [f"{one.parameters:,.0f}" for one in points]),
        Column("memory", "peak memory (GB)", [number_text(value) for value in memory]),
    ]
    return made


def best_first(points: Sequence[Point]) -> list[Point]:
    """Sort by task, then by value, the better first."""

    def place(one: Point) -> tuple[object, ...]:
        sign = -1 if one.row.higher_is_better else 1
        return (*one.context, sign * one.group.mean, one.row.method, one.row.rate)

    return sorted(points, key=place)


def plain_speeds(points: Sequence[Point]) -> list[list[float]]:
    """Return inputs/s of the unmerged model that each run was timed in turns with, the same models together."""
    found: dict[object, list[float]] = {}
    for row in (row for one in points for row in one.group.rows):
        if row.images_per_second and row.speedup:
            device = str(row.environment.get("device"))
            same = (row.backbone, row.image_size, row.plain_macs, device, row.throughput_batch_size)
            found.setdefault(same, []).append(row.images_per_second / row.speedup)
    return list(found.values())


def unsteady(points: Sequence[Point]) -> str | None:
    """Say where one and the same model was timed at very different speeds: the machine was busy with other work."""
    worst = max(plain_speeds(points), key=lambda speeds: max(speeds) / min(speeds), default=[1.0])
    if max(worst) < _STEADY * min(worst):
        return None
    return (
        f"the unmerged model itself was timed at {number_text(min(worst))} to {number_text(max(worst))} a second: the "
        "machine had other work to do; speed-ups, which are measured in turns with it, can be compared"
    )


def device_notes(points: Sequence[Point]) -> list[str]:
    """Say where speeds were measured, and where they cannot be compared because of it."""
    devices = sorted({str(device) for one in points for device, _ in one.group.devices() if device is not None})
    mixed = sum(len(one.group.devices()) > 1 for one in points)
    notes = [f"measured on {devices[0]}"] if len(devices) == 1 else []
    if len(devices) > 1:
        notes.append(f"speeds come from different devices ({', '.join(devices)}): compare speed-ups or MACs instead")
    if mixed:
        notes.append(f"{mixed} points have no speed: their seeds were timed on several devices or batches")
    busy = unsteady(points)
    return notes if busy is None else [*notes, busy]
