"""Tasks: finding them by name or folder, and their splits as data sets of tensors.

A shipped task has a card (:mod:`pyra.tasks.data.cards`); ``load_task(data=...)`` makes one from a user's folder
(layouts: :mod:`pyra.tasks.data.folders`) or from a data set of the hub.

    >>> task = load_task("demo")
    >>> task.name, len(task.labels), sorted(task.splits)
    ('demo', 10, ['test', 'train', 'validation'])
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from pyra.errors import DataError, did_you_mean
from pyra.tasks.data.cards import card_files, load_card
from pyra.tasks.data.columns import FOUND, Columns
from pyra.tasks.data.decoding import split_digest
from pyra.tasks.data.folders import read_folder
from pyra.tasks.data.hub import HubError, HubId, read_hub
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.pixel_cache import default_cache
from pyra.tasks.data.sources import load_splits

__all__ = ["ImageDataset", "Task", "image_dataset", "load_task", "split_digest", "task_names"]

LIMIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """A classification task: its classes, its splits and how it is scored.

    ``splits`` holds at least ``train`` and ``test``, each with the columns `image` (``{"bytes", "path"}``), `label`
    (index into ``labels``) and `source` (what errors call the row). ``source`` says where the data came from.
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
    source: str = ""


def task_names() -> list[str]:
    """Return the names of the tasks shipped with the package."""
    return list(card_files())


def load_task(
    task: str | None = None,
    data: str | None = None,
    root: str | None = None,
    columns: Columns = FOUND,
) -> Task:
    """Load a shipped task by name, or make one from your data; exactly one of ``task`` and ``data``.

    Args:
        task: name of a card.
        data: a folder, a parquet file, or a data set of the Hugging Face hub (:class:`pyra.tasks.data.hub.HubId`); what
            lies here wins.
        root: folder with the data of shipped tasks that bring none, by default what ``PYRA_DATA`` says.
        columns: of parquet files and data sets of the hub, where they cannot be told by type and name.

    Raises:
        DataError: neither or both given, an unknown name, or data that cannot be read as a task.
    """
    if (task is None) == (data is None):
        raise DataError("give exactly one of --task and --data: a task by name, or a folder with your images")
    if data is not None:
        return _own(data, columns)
    card, home = load_card(str(task))
    if card.kind == "text":
        raise DataError(f"task {card.name} is about texts, not images: see pyra train --task {card.name} --help")
    source = load_splits(card, home, root or os.environ.get("PYRA_DATA"))
    labels = _labels(source.splits)
    if len(labels) != card.classes:
        raise DataError(f"task {card.name} has {card.classes} classes, its files have {len(labels)}")
    return Task(
        card.name,
        labels,
        source.splits,
        metric=card.metric,
        higher_is_better=card.higher_is_better,
        preprocessing=card.preprocessing,
        description=card.description.strip(),
        license=card.license,
        version=card.version,
        source=source.where + (" (own draw)" if source.own_draw else ""),
    )


def _own(data: str, columns: Columns) -> Task:
    if not data.strip():
        raise DataError("--data is empty; give the folder with your images (. for this one)")
    path = Path(data).expanduser()
    hub = None if path.exists() else HubId.parse(data)
    if hub is None:
        splits, how = read_folder(path, columns)
        path = path.resolve()
        name, where = path.stem if path.is_file() else path.name, str(path)
        hint = "the folders directly inside it (or inside its train/) must be the classes"
    else:
        try:
            splits, how = read_hub(hub, columns)
        except HubError as error:
            raise DataError(
                f"{data} is no folder here, and {error}; a local copy may be a folder with train*.parquet and "
                "test*.parquet (columns image and label), or with one folder of images a class"
            ) from None
        name, where = hub.name, f"{hub} of the Hugging Face hub"
        hint = "--label-column names another column"
    labels = _labels(splits)
    if len(labels) < 2:
        raise DataError(f"{where} has a single class ({', '.join(labels)}): nothing to tell apart; {hint}")
    return Task(name, labels, splits, description=how, source=where)


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
    cache: bool = True,
) -> ImageDataset:
    """Decode a split into normalised tensors (see :class:`~pyra.tasks.data.images.ImageDataset`).

    ``limit`` keeps that many images, drawn with a fixed seed and left in their order. With ``cache`` decoded images are
    kept where :func:`pyra.tasks.data.pixel_cache.default_cache` says.

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
        cache=default_cache() if cache else None,
    )


def _labels(splits: Mapping[str, datasets.Dataset]) -> tuple[str, ...]:
    return tuple(splits["train"].features["label"].names)
