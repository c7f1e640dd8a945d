"""What ``--resume`` finds in the folder of a run: a finished one, an interrupted one, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyra.errors import DataError, OutputError
from pyra.files import read_json
from pyra.tasks.data import Task
from pyra.tasks.options import RunOptions
from pyra.tasks.output import put_right, unfinished
from pyra.tasks.results import RESULT_FILE, RunResult, read_result
from pyra.tasks.runs import DATA, OPTIONS, data_record, stored_options

_FREE = frozenset({"output", "overwrite", "resume", "device", "track", "save_steps"})
"""Options that may differ between the parts of a run."""


def finished(options: RunOptions) -> RunResult | None:
    """Return the result of a run with these options that is complete, or None."""
    folder = Path(options.output).expanduser()
    if folder.is_dir():
        put_right(folder, "run")
    if not (folder / RESULT_FILE).is_file() or _differing(folder, options) != []:
        return None
    return read_result(folder)


def interrupted(options: RunOptions, task: Task) -> Path | None:
    """Return the newest interrupted run of the output folder to go on with, or None where there is none.

    Raises:
        OutputError: where the ones that are there have other options.
        DataError: where the task's data is not what the run began with.
    """
    found = unfinished(options.output, "run")
    differing = {entry: _differing(entry, options) for entry in found}
    fitting = [entry for entry, names in differing.items() if names == []]
    if fitting:
        if _read(fitting[0] / DATA) != data_record(task):
            raise DataError(f"{fitting[0]} was begun on other data of {task.name}: start again, without --resume")
        return fitting[0]
    readable = {entry: names for entry, names in differing.items() if names is not None}
    if readable:
        entry, names = next(iter(readable.items()))
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise OutputError(
            f"{entry} was begun with other options ({flags}): give the same, or start again without --resume"
        )
    return None


def _differing(folder: Path, options: RunOptions) -> list[str] | None:
    """Name the options in which a folder differs, or None where it says nothing."""
    stored = _read(folder / OPTIONS)
    if not isinstance(stored, dict):
        return None
    own = stored_options(options)
    return sorted(name for name in {*stored, *own} - _FREE if stored.get(name) != _plain(own.get(name)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
