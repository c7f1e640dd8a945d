"""Finds the results below folders."""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from pyra.errors import DataError, PyraError
from pyra.tasks.output import unfinished
from pyra.tasks.results import RESULT_FILE, RunResult, evaluated_rate, read_result_file


def is_evaluation(name: str) -> bool:
    """Whether a file of this name is one that ``pyra evaluate`` wrote."""
    return fnmatch(name, "evaluation*.json")


def is_rate(name: str) -> bool:
    """Whether it holds the test split at a rate of its own, as of elastic runs."""
    return evaluated_rate(Path(name)) is not None


_PARTIAL = ".partial-"  # of an output that is being written
_LARGEST = 2**24  # bytes; a result has a few thousand


@dataclass(frozen=True)
class Found:
    """A row and the file it stands in."""

    file: Path
    row: RunResult

    @property
    def date(self) -> datetime.datetime:
        """When it was measured; long ago where that is not known."""
        try:
            found = datetime.datetime.fromisoformat(str(self.row.environment.get("date")))
        except ValueError:
            return datetime.datetime.min.replace(tzinfo=datetime.UTC)
        return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


@dataclass
class Collection:
    """What was found, the files that hold no result, each with the reason, and runs that were interrupted."""

    found: list[Found] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    interrupted: list[Path] = field(default_factory=list)


def collect(folders: Sequence[str | os.PathLike[str]], also: Callable[[str], bool] | None = None) -> Collection:
    """Read every ``result.json`` below the folders, at any depth; each file once, in order of path.

    Links inside the folders are not followed, and outputs that are being written are left out.

    Args:
        folders: to look in; a file counts by itself.
        also: which further files to read, :func:`is_evaluation` or :func:`is_rate`.

    Raises:
        DataError: a folder that is not there (all of them).
    """
    paths = [Path(folder).expanduser() for folder in folders]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such folder; give one that `pyra train --output` wrote to")
    collection = Collection()
    seen: set[Path] = set()
    for path in paths:
        root = path.resolve()
        for file in _files(path, also, collection.interrupted):
            real = root / file.relative_to(path)  # no link is followed below the folder
            if real not in seen:
                seen.add(real)
                _read(file, collection)
    return collection


def _files(path: Path, also: Callable[[str], bool] | None, interrupted: list[Path]) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for home, folders, names in os.walk(path):
        if any(name.startswith(_PARTIAL) for name in folders):
            interrupted += unfinished(home, "run")
        folders[:] = sorted(name for name in folders if not name.startswith(_PARTIAL))
        for name in sorted(names):
            if name == RESULT_FILE or (also is not None and also(name)):
                file = Path(home, name)
                if stat.S_ISREG(file.lstat().st_mode):  # a pipe would wait for ever
                    yield file


def _read(file: Path, collection: Collection) -> None:
    try:
        if file.stat().st_size > _LARGEST:
            raise DataError(f"{file} is too large for a result")
        collection.found.append(Found(file, read_result_file(file)))
    except (PyraError, OSError) as error:
        reason = " ".join(str(error).removeprefix(str(file)).lstrip(": ").split())
        collection.skipped.append((file, reason if len(reason) <= 120 else f"{reason[:119]}…"))
