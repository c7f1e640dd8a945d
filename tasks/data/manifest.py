"""What a prepared folder says of itself: which version of which task it holds, from where, with which images.

``pyra_task.json`` lies beside the splits. It is written before each split, so that a file the manifest does not name is
never ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyra.errors import DataError
from pyra.files import read_json, write_json
from pyra.records import record_problems
from pyra.tasks.data.cards import TaskCard

FILE = "pyra_task.json"
FORMAT = 1


@dataclass(frozen=True)
class SplitRecord:
    """A split: how many images, and their SHA-256, labels included (:func:`pyra.tasks.data.decoding.split_digest`)."""

    images: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared task; ``draw`` is ``"own"`` where the images of the splits were drawn by pyra, else ``"source"``."""

    task: str
    version: str
    source: str
    draw: str
    splits: Mapping[str, SplitRecord]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder it describes."""
        write_json(folder / FILE, asdict(self))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None where it has none.

    Raises:
        DataError: where there is one that is damaged, or of a newer release.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        values: Any = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; remove the folder and prepare it again") from None
    problems = record_problems(Manifest, values)
    if not problems:
        for name, record in values["splits"].items():
            problems += [f"{name}: {problem}" for problem in record_problems(SplitRecord, record)]
    if problems:
        raise DataError(f"{file} is no manifest of a prepared task: {'; '.join(problems)}")
    if values["format"] != FORMAT:
        raise DataError(f"{file} has format {values['format']}, this release reads {FORMAT}: prepare the task again")
    records = {name: SplitRecord(**record) for name, record in values["splits"].items()}
    return Manifest(**{**values, "splits": records})


def check_prepared(card: TaskCard, folder: Path) -> Manifest | None:
    """Return the manifest of a folder that holds a task, if it has one.

    Raises:
        DataError: where the folder was prepared for another task or another version of it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if manifest.task != card.name:
        raise DataError(f"{folder} was prepared as task {manifest.task}, it does not hold {card.name}")
    if manifest.version != card.version:
        raise DataError(
            f"{folder} was prepared as version {manifest.version} of {card.name}, here is version {card.version}: "
            f"remove the folder and prepare it again (`pyra tasks prepare {card.name}`)"
        )
    return manifest
