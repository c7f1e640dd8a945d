"""Tasks: finding them by name or folder, and their splits as data sets of tensors.

A shipped task is a folder of this package with a ``task.yaml``; ``load_task(data=...)`` makes one from a user's folder
(layouts: :mod:`pyra.tasks.folders`).

    >>> task = load_task("demo")
    >>> task.name, len(task.labels), sorted(task.splits)
    ('demo', 10, ['test', 'train', 'validation'])
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml

from pyra.errors import DataError, did_you_mean
from pyra.records import record_problems
from pyra.tasks.folders import read_folder, read_splits
from pyra.tasks.images import ImageDataset

__all__ = ["ImageDataset", "Task", "image_dataset", "load_task", "task_names"]

LIMIT_SEED = 0
PREPROCESSING = ("squash",)


@dataclass(frozen=True)
class Task:
    """A classification task: its classes, its splits and how it is scored.

    ``splits`` holds at least ``train`` and ``test``, each with the columns `image` (``{"bytes", "path"}``), `label`
    (index into ``labels``) and `source` (what errors call the row).
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, datasets.Dataset] = field(repr=False, compare=False)
    metric: str = "accuracy"
    higher_is_better: bool = True
    preprocessing: str = "squash"
    description: str = ""
    license: str = "unknown"
    version: str = "1"


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """What a ``task.yaml`` says; unknown keys are errors."""

    name: str
    description: str
    files: Mapping[str, str]
    classes: int
    metric: str
    higher_is_better: bool
    preprocessing: str
    license: str
    version: str
    source: str


def task_names() -> list[str]:
    """Return the names of the tasks shipped with the package."""
    return sorted(card.parent.name for card in _root().glob("*/task.yaml"))


def load_task(task: str | None = None, data: str | None = None) -> Task:
    """Load a shipped task by name, or make one from a folder; exactly one of ``task`` and ``data``.

    Raises:
        DataError: neither or both given, an unknown name, or a folder that cannot be read as a task.
    """
    if (task is None) == (data is None):
        raise DataError("give exactly one of --task and --data: a task by name, or a folder with your images")
    if data is not None:
        if not data.strip():
            raise DataError("--data is empty; give the folder with your images (. for this one)")
        path = Path(data).expanduser()
        splits, how = read_folder(path)
        path = path.resolve()
        labels = _labels(splits)
        if len(labels) < 2:
            raise DataError(
                f"{path} has a single class ({', '.join(labels)}): nothing to tell apart; "
                "the folders directly inside it (or inside its train/) must be the classes"
            )
        return Task(path.stem if path.is_file() else path.name, labels, splits, description=how)
    if task not in task_names():
        hint = did_you_mean(str(task), task_names())
        raise DataError(
            f"unknown task {task!r}{hint}; the tasks are {', '.join(task_names())}; --data FOLDER reads your own"
        )
    return _load_shipped(_root() / str(task))


def image_dataset(
    task: Task,
    split: str,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    skip_broken: bool = False,
    limit: int | None = None,
) -> ImageDataset:
    """Decode a split into normalised tensors (see :class:`~pyra.tasks.images.ImageDataset`).

    ``limit`` keeps that many images, drawn with a fixed seed and left in their order.

    Raises:
        DataError: unknown split, an empty one, or images that cannot be read.
    """
    if split not in task.splits:
        hint = did_you_mean(split, task.splits)
        raise DataError(f"task {task.name} has no split {split!r}{hint}; its splits are {', '.join(task.splits)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1 image")
    rows = task.splits[split]
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(random.Random(LIMIT_SEED).sample(range(len(rows)), limit)))
    return ImageDataset(
        rows,
        image_size=image_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        skip_broken=skip_broken,
        name=f"{task.name}/{split}",
    )


def _root() -> Path:
    return Path(__file__).parent


def _load_shipped(folder: Path) -> Task:
    card = _read_card(folder / "task.yaml")
    splits, _ = read_splits({split: [folder / file] for split, file in card.files.items()}, folder)
    labels = _labels(splits)
    if len(labels) != card.classes:
        raise DataError(f"{folder / 'task.yaml'} says {card.classes} classes, the files have {len(labels)}")
    return Task(
        card.name,
        labels,
        splits,
        metric=card.metric,
        higher_is_better=card.higher_is_better,
        preprocessing=card.preprocessing,
        description=card.description.strip(),
        license=card.license,
        version=card.version,
    )


def _read_card(path: Path) -> TaskCard:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    problems = record_problems(TaskCard, values)
    if not problems and values.get("preprocessing", PREPROCESSING[0]) not in PREPROCESSING:
        problems.append(f"preprocessing {values['preprocessing']!r} is not one of {', '.join(PREPROCESSING)}")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return TaskCard(**values)


def _labels(splits: Mapping[str, datasets.Dataset]) -> tuple[str, ...]:
    return tuple(splits["train"].features["label"].names)
