"""Whether the data of a task is what its card says, found before anything is trained."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from pyra.errors import DataError
from pyra.tasks.data.cards import load_card
from pyra.tasks.data.columns import FOUND, Columns
from pyra.tasks.data.decoding import decoded, split_digest, summary, unreadable_rows
from pyra.tasks.data.duplicates import shared_content
from pyra.tasks.data.manifest import Manifest, check_prepared
from pyra.tasks.data.sources import TUNING, MissingData
from pyra.tasks.data.task import Task, load_task
from pyra.tasks.language.cards import is_text_task
from pyra.tasks.language.validation import check_text_task

_SHOWN = 5


@dataclass(frozen=True)
class Checked:
    """What was found: images of each split, what makes the task unusable, and what is worth knowing.

    ``missing`` is set where there is no data at all.
    """

    task: str
    images: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: bool = False

    @property
    def error(self) -> str | None:
        """All problems in one line, or None."""
        return "; ".join(self.problems) or None


def validate(name: str, root: str | None = None, decode: bool = True, data: str | None = None) -> Checked:
    """Check the data of a shipped task: files, lists, labels, counts, classes, and that images can be read.

    Args:
        name: of the task.
        root: folder with the data of tasks that bring none.
        decode: decode every image.
        data: of a language task, folder with its files themselves, instead of ``root``.

    Raises:
        DataError: for an unknown task; what is wrong with its data is returned, all of it.
    """
    if is_text_task(name):
        return Checked(name, *check_text_task(name, root, data))
    card, _ = load_card(name)
    try:
        task = load_task(name, root=root)
        manifest = check_prepared(card, Path(root).expanduser() / (card.folder or card.name)) if root else None
    except DataError as error:
        return Checked(name, problems=[str(error)], missing=isinstance(error, MissingData))
    images = _sizes(task)
    wrong = [
        f"{split} has {images[split]} images, its card says {count}"
        for split, count in card.splits.items()
        if split in images and images[split] != count
    ]
    problems = [text for text in wrong if text.partition(" ")[0] in TUNING]
    problems += _faults(task, decode, manifest)
    notes = [text for text in wrong if text.partition(" ")[0] not in TUNING] + _untrained(task)
    if task.source.endswith("(own draw)") and card.kind != "sprites":
        notes.append("which images are in train800 and val200 is our own draw")
    return Checked(name, images, problems, notes)


def validate_data(data: str, columns: Columns = FOUND, decode: bool = True) -> Checked:
    """Check data of your own: columns, labels, classes, and that images can be read.

    Args:
        data: what ``--data`` takes: a folder, a parquet file, or a data set of the hub.
        columns: which hold images and labels.
        decode: decode every image.
    """
    try:
        task = load_task(data=data, columns=columns)
    except DataError as error:
        return Checked(data, problems=[str(error)])
    notes = [task.description, *_untrained(task), *filter(None, [shared_content(task.splits)])]
    return Checked(task.name, _sizes(task), _faults(task, decode), notes)


def _sizes(task: Task) -> dict[str, int]:
    """Return the images of each split, the parts of the benchmark after those every task has."""
    order = ["train", "validation", "test", *TUNING]
    return {split: len(task.splits[split]) for split in order if split in task.splits}


def _faults(task: Task, decode: bool, manifest: Manifest | None = None) -> list[str]:
    problems = _empty_classes(task.splits, task.labels) + _shared_images(task.splits)
    if manifest is not None:
        problems += _changed(task.splits, manifest)
    for split in _parts(task.splits) if decode else []:
        problems += _unreadable(task, split)
    return problems


def _untrained(task: Task) -> list[str]:
    lost = _classes(task.splits["test"]) - _classes(task.splits["train"])
    if not lost:
        return []
    shown = ", ".join(task.labels[label] for label in sorted(lost)[:_SHOWN])
    return [f"{len(lost)} classes of the test split have no training image ({shown})"]


def _unreadable(task: Task, split: str) -> list[str]:
    rows = task.splits[split]
    found = enumerate(decoded(rows, 8, "nearest", f"{task.name}/{split}"))
    broken = {row: image for row, image in found if isinstance(image, str)}
    return [f"{split}: {summary(unreadable_rows(rows, broken), len(rows))}"] if broken else []


def _changed(splits: Mapping[str, datasets.Dataset], manifest: Manifest) -> list[str]:
    changed = [name for name, record in manifest.splits.items() if split_digest(splits[name]) != record.sha256]
    return [f"{name}.parquet is not what was prepared (its SHA-256 differs)" for name in changed]


def _parts(splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """Name the splits that have all images between them, each once."""
    parts = ["train800", "val200"] if "train800" in splits else ["train", "validation"]
    found = [name for name in (*parts, "test") if name in splits]
    return [name for name in found if name == "test" or splits[name] is not splits["test"]]


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
