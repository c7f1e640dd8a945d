"""What the reader of a table has to know: rows that cannot be compared, baselines that are missing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from pyra.files import read_json
from pyra.tasks.data.cards import card_files, load_card
from pyra.tasks.reports.groups import Group, backbone_name

_MUST_AGREE = {
    "task_version": "versions of the task",
    "test_sha256": "images",
    "train_sha256": "training images",
    "preprocessing": "preprocessing",
    "metric": "metrics",
}
_NAMED = 4


def warnings(groups: Sequence[Group]) -> list[str]:
    """Name what keeps rows of one task and split from being compared."""
    found = []
    runs = [one for one in groups if not one.baseline]
    for task, split in dict.fromkeys((one.row.task, one.row.split) for one in runs):
        same = [one for one in runs if (one.row.task, one.row.split) == (task, split)]
        for name, what in _MUST_AGREE.items():
            values: dict[Any, list[str]] = {}
            for one in same:
                value = _few_shot(one) if name == "train_sha256" else getattr(one.row, name)
                if value is not None:
                    values.setdefault(value, []).append(one.row.method)
            if len(values) > 1:
                listed = "; ".join(f"{str(value)[:12]}: {_listed(methods)}" for value, methods in values.items())
                where = task if split == "test" else f"{task} ({split})"
                what = what.replace("images", same[0].row.unit)
                found.append(f"warning: rows of {where} cannot be compared, they differ in {what} ({name}: {listed})")
    old = sum(len(one.members) for one in runs if one.row.test_sha256 is None or one.row.settings is None)
    if old:
        found.append(
            f"{old} of {sum(len(one.members) for one in runs)} runs do not say on which images or with which settings "
            "(earlier versions did not): runs that differ in those may stand in one row"
        )
    return found


def missing_probes(groups: Sequence[Group]) -> list[str]:
    """Say how to make the linear probes that a table of results lacks; other metrics are of tasks that take no head."""
    runs = [one for one in groups if not one.baseline and one.row.metric == "accuracy"]
    probed = {(one.row.task, backbone_name(one.row)) for one in runs if one.row.method == "linear"}
    wanted = {(one.row.task, backbone_name(one.row)): one for one in runs}
    lines = [
        f"no linear probe of {backbone or 'the backbone'} on {task}: {_command(one)}"
        for (task, backbone), one in wanted.items()
        if (task, backbone) not in probed
    ]
    more = f"{len(lines) - _NAMED} more linear probes are missing"
    return lines if len(lines) <= _NAMED + 1 else [*lines[:_NAMED], more]


def _few_shot(one: Group) -> str | None:
    """Return what was trained on; of few-shot runs, whose images are drawn, how many."""
    shots = (one.row.settings or {}).get("shots")
    return one.row.train_sha256 if shots is None else f"{shots} a class"


def _command(one: Group) -> str:
    row = one.row
    # A task of somebody's own folder is called as the folder is, which may be anywhere.
    settings = row.settings or {}
    task = row.task.removesuffix(f"-{settings.get('shots')}shot")  # what few-shot tasks are called
    own = task not in card_files()
    given = _options_of(one)
    data = ["--data", given.get("data") or row.data_source or task] if own else ["--task", task]
    if not own and not load_card(task)[0].brings_its_data:
        data += ["--root", given.get("root") or "FOLDER"]
    for name in ("shots", "limit"):
        data += [] if settings.get(name) is None else [f"--{name}", str(settings[name])]
    backbone = ["--backbone", row.backbone] if row.backbone not in (None, "demo") else []
    size = ["--image-size", str(row.image_size)] if backbone and row.image_size else []
    parts = ["pyra", "train", *data, *backbone, *size, "--method", "linear", "--output", f"runs/{row.task}-linear"]
    return shlex.join(str(part) for part in parts)


def _options_of(one: Group) -> dict[str, Any]:
    """Return the options stored beside the first run, which say where its data lies; nothing where they are gone."""
    try:
        stored = read_json(one.members[0].file.parent / "options.json")
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
