"""Whether the data of a task is what its card says, found before anything is trained."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from pyra.errors import DataError
from pyra.tasks.cards import load_card
from pyra.tasks.data import image_dataset, load_task
from pyra.tasks.language.cards import is_text_task
from pyra.tasks.language.validation import check_text_task

_SHOWN = 5


@dataclass(frozen=True)
class Checked:
    """What was found: images of each split, an error that makes the task unusable, and what is worth knowing."""

    task: str
    images: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    notes: list[str] = field(default_factory=list)


def validate(name: str, root: str | None = None, decode: bool = True) -> Checked:
    """Check the data of a shipped task: files, lists, labels, counts, classes, and that images can be read.

    Args:
        name: of the task.
        root: folder with the data of tasks that bring none.
        decode: decode every image.

    Raises:
        DataError: for an unknown task; what is wrong with its data is returned.
    """
    if is_text_task(name):
        return Checked(name, *check_text_task(name, root))
    card, _ = load_card(name)
    try:
        task = load_task(name, root=root)
        images = {split: len(rows) for split, rows in task.splits.items()}
        wrong = [
            f"{split} has {images[split]} images, its card says {count}"
            for split, count in card.splits.items()
            if split in images and images[split] != count
        ]
        small = {split: images[split] for split in ("train800", "val200") if split in images}
        problems = [text for text in wrong if text.partition(" ")[0] in small]
        problems += _empty_classes(task.splits, task.labels) + _shared_images(task.splits)
        if problems:
            return Checked(name, images, "; ".join(problems))
        if decode:
            for split in _parts(images):
                image_dataset(task, split, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    except DataError as error:
        return Checked(name, error=str(error).partition(". Repair or remove")[0])
    notes = [text for text in wrong if text.partition(" ")[0] not in small]
    lost = _classes(task.splits["test"]) - _classes(task.splits["train"])
    if lost:
        shown = ", ".join(task.labels[label] for label in sorted(lost)[:_SHOWN])
        notes.append(f"{len(lost)} classes of the test split have no training image ({shown})")
    return Checked(name, images, notes=notes)


def _parts(images: dict[str, int]) -> list[str]:
    """Name the splits that have all images between them, each once."""
    parts = ["train800", "val200"] if "train800" in images else ["train", "validation"]
    return [name for name in (*parts, "test") if name in images]


def _classes(rows: datasets.Dataset) -> set[int]:
    return set(rows["label"][:])


def _empty_classes(splits: Mapping[str, datasets.Dataset], labels: tuple[str, ...]) -> list[str]:
    seen = Counter(label for rows in splits.values() for label in rows["label"][:])
    empty = [name for label, name in enumerate(labels) if not seen[label]]
    return [f"no split has an image of class {', '.join(empty[:_SHOWN])}"] if empty else []


def _shared_images(splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """A training image in the test split makes every number too good."""
    trained, tested = (
        {os.path.normpath(Path(source)) for source in splits[name]["source"][:]} for name in ("train", "test")
    )
    shared = sorted(trained & tested)
    return [f"{len(shared)} images are in the training and the test split, such as {shared[0]}"] if shared else []
