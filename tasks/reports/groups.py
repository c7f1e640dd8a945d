"""Runs that differ in their seed only are one row: their mean and standard deviation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.table import protocol_label
from pyra.tasks.results import RunResult

MAJORITY = "majority class"
_SAME = (
    "task", "task_version", "split", "test_sha256", "metric", "higher_is_better", "preprocessing", "num_test", "method",
    "rate", "schedule", "macs", "backbone", "weights_sha256", "image_size", "batch_size", "epochs", "protocol",
    "selection",
)  # fmt: skip
_SHOWN = ("task", "method", "rate", "backbone", "protocol", "split")
_FOLLOWS = ("macs", "schedule", "rate", "weights_sha256")  # from what was asked for
_SHORT = 8  # characters of a hash
_NAMED = 3


@dataclass(frozen=True)
class Group:
    """The runs of one method, one a seed, in order of seed; ``baseline`` marks a row that no run made."""

    members: tuple[Found, ...]
    baseline: bool = False

    @property
    def row(self) -> RunResult:
        """The first run: what all of them share is its."""
        return self.members[0].row

    @property
    def rows(self) -> list[RunResult]:
        """All runs."""
        return [member.row for member in self.members]

    @property
    def seeds(self) -> list[int]:
        """Their seeds; none for a baseline."""
        return [] if self.baseline else [row.seed for row in self.rows]

    @property
    def draws(self) -> list[tuple[int, int]]:
        """Seed, and seed of the few-shot images, of each run."""
        return [] if self.baseline else [draw_of(row) for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return float(statistics.mean(row.value for row in self.rows))

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the values (of a sample), or None for one run or what no float holds."""
        try:
            return float(statistics.stdev(row.value for row in self.rows)) if len(self.members) > 1 else None
        except OverflowError:
            return None

    def average(self, name: str) -> float | None:
        """Return the mean of a measured column, or None where a run did not measure it."""
        values = [getattr(row, name) for row in self.rows]
        return None if any(value is None for value in values) else float(statistics.mean(values))

    def shared(self, name: str) -> Any:
        """Return the value of a column that all runs share, or None."""
        values = [getattr(row, name) for row in self.rows]
        return values[0] if all(value == values[0] for value in values) else None

    def devices(self) -> set[tuple[str | None, int | None]]:
        """Return device and batch of every measured speed."""
        named = [row.environment.get("device") for row in self.rows]
        devices = [None if device is None else str(device) for device in named]
        return {(device, row.throughput_batch_size) for device, row in zip(devices, self.rows, strict=True)}


def group(found: Sequence[Found], by_seed: bool = False) -> tuple[list[Group], list[str]]:
    """Put runs that differ in their seed only together.

    A seed that is there twice counts once: the newest.

    Args:
        found: runs.
        by_seed: keep every seed apart.

    Returns:
        The groups in order of first appearance, and what the reader has to know.
    """
    together: dict[str, dict[tuple[int, int], list[Found]]] = {}
    for one in found:
        key = _text({**identity(one.row), "seed": one.row.seed if by_seed else None})
        together.setdefault(key, {}).setdefault(draw_of(one.row), []).append(one)
    notes, groups = [], []
    for draws in together.values():
        newest = {draw: max(same, key=lambda one: one.date) for draw, same in sorted(draws.items())}
        for draw, same in sorted(draws.items()):
            if len({one.file.parent for one in same}) > 1:
                named = _places([one.file.parent for one in same])
                who = f"seed {draw_text(draw)} of {_name(newest[draw].row)}"
                notes.append(f"{who} is there {len(same)} times ({named}): the newest counts")
        groups.append(Group(tuple(newest.values())))
    return groups, notes


def identity(row: RunResult) -> dict[str, Any]:
    """Return all that makes two runs the same but for their seed.

    What was chosen by the rule of the protocol may differ between seeds, and so may few-shot training images.
    """
    chosen = set(row.chosen or {})
    cost = {"rate", "schedule", "macs"}
    chosen |= cost if cost & chosen else set()
    same = {name: getattr(row, name) for name in _SAME if name not in chosen}
    same["backbone"] = backbone_name(row)
    settings = {name: value for name, value in (row.settings or {}).items() if name not in chosen}
    drawn = settings.get("shots") is not None
    if drawn:
        settings.pop("shots_seed", None)
    adapter = {} if chosen else dict(row.adapter or {})
    train = None if drawn else row.train_sha256
    return {**same, "train_sha256": train, "settings": settings, "adapter": adapter}


def backbone_name(row: RunResult) -> str | None:
    """Return what tells backbones apart: where the hash of the weights is known, a folder counts whatever its path."""
    known = row.backbone is not None and row.weights_sha256 not in (None, "random")
    return Path(str(row.backbone)).name if known else row.backbone


def draw_of(row: RunResult) -> tuple[int, int]:
    """Return the seed of a run and, for few-shot training, the seed that drew its images, else 0."""
    settings = row.settings or {}
    draw = settings.get("shots_seed") if settings.get("shots") is not None else 0
    return row.seed, draw if isinstance(draw, int) else 0


def draw_text(draw: tuple[int, int]) -> str:
    """Return what tables call a seed."""
    return f"{draw[0]} draw {draw[1]}" if draw[1] else str(draw[0])


def seeds_text(one: Group) -> str:
    """Return the seeds of a group, or their number where there are many."""
    draws = one.draws
    return (",".join(map(draw_text, draws)) if len(draws) <= 5 else f"{len(draws)} seeds") or "-"


def differences(groups: Sequence[Group], by_seed: bool = False) -> list[str]:
    """Say of each group how it differs from those that look the same in a table; empty where it is the only one."""
    alike: dict[str, list[int]] = {}
    for index, one in enumerate(groups):
        looks = [shown(one, name) for name in (*_SHOWN, *(["seed"] if by_seed else []))]
        alike.setdefault(_text(looks), []).append(index)
    texts = [""] * len(groups)
    for same in alike.values():
        if len(same) > 1:
            for index, text in zip(same, _told_apart([groups[index] for index in same]), strict=True):
                texts[index] = text
    return texts


def _told_apart(groups: Sequence[Group]) -> list[str]:
    flat = [_flat(identity(one.row)) for one in groups]
    names = [
        name
        for name in dict.fromkeys(name for one in flat for name in one)
        if len({_text(one.get(name)) for one in flat}) > 1
    ]
    plain = [name for name in names if not name.startswith("adapter.")]  # settings say the same in few words
    plain = [name for name in plain if name not in _FOLLOWS] or plain or names
    cut = plain[:_NAMED]
    more = "" if len(plain) <= _NAMED else " …"
    return [", ".join(f"{name.rpartition('.')[2]}={_short(one.get(name))}" for name in cut) + more for one in flat]


def shown(one: Group, name: str) -> str:
    """Return how tables name a group in one respect: task, method, rate, backbone, seed, protocol or split."""
    row = one.row
    if one.baseline and name in ("rate", "backbone", "seed", "protocol"):
        return "-"
    if name == "rate":
        return f"{row.rate:.2f}"
    if name == "protocol":
        return protocol_label(row.protocol)
    if name == "seed":
        return str(row.seed)
    value = getattr(row, name)
    return "-" if value is None else str(value)


def majority_groups(groups: Iterable[Group]) -> list[Group]:
    """Return what always answering the most frequent training class scores.

    One row for each set of scored images and value; where that is several, ``settings`` tell in which images the class
    was counted.
    """
    made: dict[tuple[Any, ...], Group] = {}
    for one in groups:
        row = one.row
        if row.majority_value is None:
            continue
        key = (row.task, row.task_version, row.split, row.test_sha256, row.metric, row.majority_value)
        values = {name: getattr(row, name) for name in (
            "task", "metric", "higher_is_better", "split", "task_version", "test_sha256", "preprocessing", "num_test",
            "majority_value", "data_source",
        )}  # fmt: skip
        settings = row.settings or {}
        both = row.protocol in ("validation", "published") and settings.get("shots") is None
        counted: dict[str, Any] = {"counted_in": "training + validation" if both else "training"}
        counted |= {name: settings.get(name) for name in ("shots", "shots_seed", "limit")}
        baseline = RunResult(
            **values, settings=counted, method=MAJORITY, value=row.majority_value, macs=0, schedule=[], rate=0.0,
            trained_parameters=0, seed=0,
        )  # fmt: skip
        made.setdefault(key, Group((Found(Path(), baseline),), baseline=True))
    return list(made.values())


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _text(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:_SHORT]
    return text if len(text) <= 24 else f"{text[:23]}…"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _name(row: RunResult) -> str:
    return f"{row.method} on {row.task}"


def _places(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")
