"""What ``--resume`` finds in the folder of a run: a finished one, an interrupted one, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError, DataError, OutputError
from pyra.files import read_json
from pyra.tasks.data.task import Task
from pyra.tasks.fitting import processes
from pyra.tasks.options import RunOptions
from pyra.tasks.output import Kind, put_right, staged_output, unfinished
from pyra.tasks.results import RESULT_FILE, RunResult, read_result
from pyra.tasks.runs import DATA, OPTIONS, data_record, stored_options

FREE = frozenset({"output", "overwrite", "resume", "device", "track", "save_steps", "cache"})
"""Options that may differ between the parts of a run."""


@dataclass(frozen=True)
class Begin:
    """What an output is begun with: with the same, an interrupted one goes on.

    Attributes:
        output: its folder.
        options: all of them, as they are stored.
        name: of the task.
        data: record of the task's data, as it is stored; None where nothing is compared with it.
        resume: go on with an interrupted one.
        overwrite: replace a finished one.
    """

    output: str
    options: dict[str, Any]
    name: str = ""
    data: dict[str, Any] | None = None
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, options: RunOptions, task: Task | None = None) -> Begin:
        """Return that of a run on images."""
        data = None if task is None else data_record(task)
        name = "" if task is None else task.name
        return cls(options.output, stored_options(options), name, data, options.resume, options.overwrite)


def finished(options: RunOptions, task: Task) -> RunResult | None:
    """Return the result of a run with these options that is complete, or None.

    Raises:
        DataError: where it was made from other data of the task.
    """
    return finished_as(Begin.of(options, task))


def finished_as(begin: Begin) -> RunResult | None:
    """Return the result of a run that was begun so and is complete, or None."""
    if not _is_finished(begin, "run", RESULT_FILE):
        return None
    try:
        return read_result(begin.output)
    except (DataError, ConfigError) as error:
        raise DataError(f"{error}; remove {begin.output} to train this run again") from None


def is_finished(options: RunOptions, task: Task, kind: Kind, file: str) -> bool:
    """Whether the output folder holds the last file of a complete run with these options.

    Raises:
        DataError: where it was made from other data of the task.
    """
    return _is_finished(Begin.of(options, task), kind, file)


def _is_finished(begin: Begin, kind: Kind, file: str) -> bool:
    folder = Path(begin.output).expanduser()
    if folder.is_dir():
        put_right(folder, kind)
    if not (folder / file).is_file() or _differing(folder, begin.options) != []:
        return False
    if _of_other_data(folder, begin):
        raise DataError(f"{folder} was made from other data of {begin.name}: give another --output, or --overwrite")
    return True


@contextmanager
def shared_output(options: RunOptions, task: Task, kind: Kind = "run") -> Iterator[Path]:
    """The folder of a run on images while it is written; see :func:`shared_folder`."""
    with shared_folder(Begin.of(options, task), kind) as folder:
        yield folder


@contextmanager
def shared_folder(begin: Begin, kind: Kind = "run") -> Iterator[Path]:
    """The folder of an output while it is written: the main process opens and ends it, every process knows it.

    Raises:
        OutputError: as of :func:`pyra.tasks.output.staged_output`.
        OutputError, DataError: as of :func:`interrupted`.
    """
    with ExitStack() as stack:

        def enter() -> Path:
            resumed = interrupted(begin, kind) if begin.resume else None
            return stack.enter_context(staged_output(begin.output, kind, begin.overwrite, resumed))

        folder = processes.on_main(enter)
        yield folder
        processes.wait()
        processes.on_main(stack.close)


@contextmanager
def several(folder: Path) -> Iterator[None]:
    """Say, where several runs below a folder are interrupted, how they go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if processes.is_main():
            print(f"what is finished below {folder} is kept; the same line with --resume goes on", file=sys.stderr)
        raise


def interrupted(begin: Begin, kind: Kind = "run") -> Path | None:
    """Return the newest interrupted run of the output folder to go on with, or None where there is none.

    Raises:
        OutputError: where the ones that are there have other options.
        DataError: where the task's data is not what the run began with.
    """
    found = unfinished(begin.output, kind)
    differing = {entry: _differing(entry, begin.options) for entry in found}
    fitting = [entry for entry, names in differing.items() if names == []]
    if fitting:
        if _of_other_data(fitting[0], begin):
            raise DataError(f"{fitting[0]} was begun on other data of {begin.name}: start again, without --resume")
        return fitting[0]
    readable = {entry: names for entry, names in differing.items() if names is not None}
    if readable:
        entry, names = next(iter(readable.items()))
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise OutputError(
            f"{entry} was begun with other options ({flags}): give the same, or start again without --resume"
        )
    return None


def _of_other_data(folder: Path, begin: Begin) -> bool:
    """Whether what a folder says of its data contradicts the record; it may say more."""
    if begin.data is None:
        return False
    stored = _read(folder / DATA)
    return not isinstance(stored, dict) or any(stored.get(name) != value for name, value in begin.data.items())


def _differing(folder: Path, own: dict[str, Any]) -> list[str] | None:
    """Name the options in which a folder differs, or None where it says nothing."""
    stored = _read(folder / OPTIONS)
    if not isinstance(stored, dict):
        return None
    return sorted(name for name in {*stored, *own} - FREE if stored.get(name) != _plain(own.get(name)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
