"""The table of a folder of results: a row a method, its seeds together; and the same as records with full precision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pyra.tasks.reports.formats import Table, clean
from pyra.tasks.reports.groups import Group, backbone_name, differences, seeds_text, shown
from pyra.tasks.reports.table import (
    ANSWER_NLL,
    ANSWER_TOKENS,
    macs_unit,
    metric_name,
    number_text,
    protocol_label,
    value_text,
)

SORTS = ("name", "value", "rate", "macs", "speed")
_MEASURED = (
    "answer_nll", "answer_tokens", "images_per_second", "speedup", "train_seconds", "wall_seconds",
    "peak_memory_bytes", "energy_joules",
)  # fmt: skip
_SHARED = (
    "unit", "throughput_batch_size", "trained_parameters", "macs", "plain_macs", "schedule", "image_size",
    "preprocessing", "batch_size", "epochs", "num_test", "task_version", "test_sha256", "train_sha256",
    "weights_sha256", "data_source", "selection", "settings", "adapter", "energy_of",
)  # fmt: skip


def ordered(groups: Sequence[Group], sort: str = "name") -> list[Group]:
    """Sort within each task and metric: baselines and linear probes first, or best, cheapest or fastest first."""

    def place(one: Group) -> tuple[Any, ...]:
        row = one.row
        name = (not one.baseline, row.method != "linear", row.method, row.rate, row.backbone or "")
        keys: dict[str, Any] = {
            "name": 0,
            "value": -one.mean if row.higher_is_better else one.mean,
            "rate": row.rate,
            "macs": row.macs,
            "speed": -(one.average("images_per_second") or 0.0),
        }
        return (row.task, row.metric, keys[sort], name, str(row.protocol), one.seeds)

    return sorted(groups, key=place)


def summary(groups: Sequence[Group]) -> Table:
    """Return the table; what is the same for all rows (task, backbone, split, batch, device) stands in no column."""
    columns: dict[str, list[str]] = {}
    runs = [one for one in groups if not one.baseline]
    for name in ("task", "split"):
        texts = [shown(one, name) for one in groups]
        if name == "task" or set(texts) != {"test"}:
            columns[name] = texts
    columns["method"] = [shown(one, "method") for one in groups]
    if len({backbone_name(one.row) for one in runs}) > 1:
        columns["backbone"] = [shown(one, "backbone") for one in groups]
    different = differences(groups)
    if any(different):
        columns["with"] = different
    columns["protocol"] = [shown(one, "protocol") for one in groups]
    left = len(columns)
    columns["rate"] = [shown(one, "rate") for one in groups]
    header, in_cell = value_header(groups)
    columns[header] = [value_cell(one, in_cell) for one in groups]
    for name, title in (("answer_nll", ANSWER_NLL), ("answer_tokens", ANSWER_TOKENS)):
        found = [None if one.baseline or one.row.metric == name else one.average(name) for one in groups]
        if any(value is not None for value in found):
            columns[title] = [number_text(value) for value in found]
    columns["seeds"] = [seeds_text(one) for one in groups]
    columns["trained parameters"] = ["-" if one.baseline else _parameters(one) for one in groups]
    unit, size = macs_unit([one.row for one in groups])
    columns[f"MACs ({unit})"] = ["-" if one.baseline else number_text(one.row.macs / size) for one in groups]
    columns |= _speed(groups)
    return Table(list(columns), [list(line) for line in zip(*columns.values(), strict=True)], left)


def value_header(groups: Sequence[Group]) -> tuple[str, bool]:
    """Return the header of the values, and whether each cell has to name its metric."""
    names = {_metric(one) for one in groups}
    return (names.pop(), False) if len(names) == 1 else ("value", True)


def value_cell(one: Group, named: bool = False) -> str:
    """Return mean and standard deviation of a group as people read them."""
    text = value_text(one.row.metric, one.mean, one.deviation)
    return f"{_metric(one)} {text}" if named else text


def records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a record a group with all columns, measured ones averaged and others None where the seeds differ."""
    different = differences(groups)
    return [_record(one, text) for one, text in zip(groups, different, strict=True)]


def _record(one: Group, different: str) -> dict[str, Any]:
    row, runs = one.row, not one.baseline
    environments = [row.environment for row in one.rows]

    def every(name: str) -> Any:
        values = [environment.get(name) for environment in environments]
        return values[0] if all(value == values[0] for value in values) else sorted({str(value) for value in values})

    return {
        "task": row.task,
        "split": row.split,
        "method": row.method,
        "rate": row.rate if runs else None,
        "backbone": row.backbone,
        "with": different or None,
        "protocol": protocol_label(row.protocol) if runs else None,
        "metric": row.metric,
        "higher_is_better": row.higher_is_better,
        "value_mean": one.mean,
        "value_std": one.deviation,
        "seeds": one.seeds,
        "values": [row.value for row in one.rows],
        "majority_value": row.majority_value,
        "chosen": [row.chosen for row in one.rows] if any(row.chosen for row in one.rows) else None,
        **{name: one.average(name) if runs else None for name in _MEASURED},
        **{name: one.shared(name) if runs or name in _OF_DATA else None for name in _SHARED},
        **{name: every(name) if runs else None for name in ("device", "torch", "git_commit", "git_dirty", "date")},
        "files": [str(member.file) for member in one.members] if runs else [],
    }


_OF_DATA = frozenset({"preprocessing", "num_test", "task_version", "test_sha256", "data_source"})


def csv_cell(value: Any) -> Any:
    """Return a value of a record as it stands in a CSV file: numbers in full, lists and settings as JSON.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{clean(value)}" if value.lstrip()[:1] in tuple("=+-@") else clean(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _metric(one: Group) -> str:
    name = metric_name(one.row.metric)
    return name if one.row.higher_is_better else f"{name} ↓"


def _parameters(one: Group) -> str:
    return f"{one.row.trained_parameters:,}"


def _speed(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return speed, and batch and device where they differ; speeds of several devices have no mean."""
    runs = [one for one in groups if not one.baseline]
    units = {one.row.unit for one in runs}
    where = {pair for one in runs for pair in one.devices()}
    batches, devices = {batch for _, batch in where}, {device for device, _ in where}
    batch = f" (batch {next(iter(batches))})" if len(batches) == 1 and None not in batches else ""
    header = f"{units.pop()}/s{batch}" if len(units) == 1 else f"speed{batch}"
    named = header.startswith("speed")
    texts = []
    for one in groups:
        measured = one.average("images_per_second") if len(one.devices()) == 1 and not one.baseline else None
        texts.append(number_text(measured) + (f" {one.row.unit}/s" if named and measured is not None else ""))
    columns = {header: texts}
    if not batch:
        columns["batch"] = [_several(one, 1) for one in groups]
    if len(devices) > 1:
        columns["device"] = [_several(one, 0) for one in groups]
    return columns


def _several(one: Group, part: int) -> str:
    found = {pair[part] for pair in one.devices()}
    text = str(found.pop()) if len(found) == 1 else "several"
    return "-" if one.baseline or text == "None" else text


def devices_note(groups: Sequence[Group]) -> list[str]:
    """Return where speeds were measured, where it is one place."""
    devices = {device for one in groups if not one.baseline for device, _ in one.devices()}
    return [f"measured on {devices.pop()}"] if len(devices) == 1 and None not in devices else []
