"""Tasks: finding them by name or folder, and their splits as data sets of tensors.

A shipped task has a card (:mod:`pyra.tasks.cards`); ``load_task(data=...)`` makes one from a user's folder (layouts:
:mod:`pyra.tasks.folders`).

    >>> task = load_task("demo")
    >>> task.name, len(task.labels), sorted(task.splits)
    ('demo', 10, ['test', 'train', 'validation'])
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from pyra.errors import DataError, did_you_mean
from pyra.tasks.cards import card_files, load_card
from pyra.tasks.folders import read_folder
from pyra.tasks.images import ImageDataset
from pyra.tasks.sources import load_splits

__all__ = ["ImageDataset", "Task", "image_dataset", "load_task", "task_names"]

LIMIT_SEED = 0


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


def task_names() -> list[str]:
    """Return the names of the tasks shipped with the package."""
    return list(card_files())


def load_task(task: str | None = None, data: str | None = None, root: str | None = None) -> Task:
    """Load a shipped task by name, or make one from a folder; exactly one of ``task`` and ``data``.

    ``root`` is the folder with the data of shipped tasks that bring none, by default what ``PYRA_DATA`` says.

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
    card, home = load_card(str(task))
    if card.kind == "text":
        raise DataError(f"task {card.name} is about texts, not images: see pyra train --task {card.name} --help")
    splits = load_splits(card, home, root or os.environ.get("PYRA_DATA"))
    labels = _labels(splits)
    if len(labels) != card.classes:
        raise DataError(f"task {card.name} has {card.classes} classes, its files have {len(labels)}")
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


def split_digest(rows: datasets.Dataset) -> str:
    """Return the SHA-256 of a split: its images as they are stored, and their labels, in order.

    Raises:
        DataError: where an image cannot be read.
    """
    digest = hashlib.sha256()
    for row in rows:
        image = row["image"] or {"bytes": None, "path": None}
        try:
            stored = Path(image["path"]).read_bytes() if image["bytes"] is None and image["path"] else image["bytes"]
        except OSError as error:
            raise DataError(f"{image['path']} cannot be read: {error.strerror}") from None
        digest.update(hashlib.sha256(stored or b"").digest() + int(row["label"]).to_bytes(4, "big"))
    return digest.hexdigest()


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


def _labels(splits: Mapping[str, datasets.Dataset]) -> tuple[str, ...]:
    return tuple(splits["train"].features["label"].names)
