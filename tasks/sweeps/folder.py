"""The folder of a sweep, which is all that a sweep remembers.

sweep/
sweep.json          the options it was last started with
runs/NAME/          a run (pyra.tasks.runs); NAME ends with its address (pyra.tasks.sweeps.grid)
failures/NAME.json  why a run failed, until it is tried again
jobs/               what workers printed
report.html, front.png, report.md
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from pyra.errors import DataError
from pyra.files import read_json, write_json
from pyra.tasks.evaluation import evaluation_file
from pyra.tasks.results import RESULT_FILE
from pyra.tasks.runs import stored_options
from pyra.tasks.sweeps.grid import Planned, SweepOptions

SWEEP, RUNS, FAILURES, JOBS = "sweep.json", "runs", "failures", "jobs"


@dataclasses.dataclass(frozen=True)
class State:
    """What has become of the runs of a sweep, each in one of the lists."""

    finished: list[Planned]
    failed: list[Planned]
    waiting: list[Planned]


def run_folder(folder: Path, planned: Planned) -> Path:
    """Return the folder of a run."""
    return folder / RUNS / planned.name


def is_finished(folder: Path, planned: Planned) -> bool:
    """Whether a run is complete, with all that an elastic one is scored at."""
    own = run_folder(folder, planned)
    files = [RESULT_FILE, *(evaluation_file("test", rate) for rate in planned.rates)]
    return all((own / file).is_file() for file in files)


def state(folder: Path, runs: list[Planned], retry: bool = False) -> State:
    """Look at a folder; with ``retry`` what failed waits again."""
    found = State([], [], [])
    for planned in runs:
        if is_finished(folder, planned):
            found.finished.append(planned)
        elif not retry and failure_file(folder, planned).is_file():
            found.failed.append(planned)
        else:
            found.waiting.append(planned)
    return found


def failure_file(folder: Path, planned: Planned) -> Path:
    """Return the file that says why a run failed."""
    return folder / FAILURES / f"{planned.name}.json"


def note_failure(folder: Path, planned: Planned, kind: str, error: str) -> None:
    """Write down why a run failed, in one line."""
    file = failure_file(folder, planned)
    file.parent.mkdir(exist_ok=True)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    options = stored_options(planned.options)
    write_json(file, {"run": planned.name, "kind": kind, "error": error, "when": when, "options": options})


def forget_failure(folder: Path, planned: Planned) -> None:
    """Remove what was written down of a run that has finished since."""
    failure_file(folder, planned).unlink(missing_ok=True)


def failures(folder: Path) -> list[dict[str, Any]]:
    """Return what is written down of the runs that failed, by name.

    Raises:
        DataError: for a damaged file.
    """
    found = []
    for file in sorted((folder / FAILURES).glob("*.json")):
        try:
            record = read_json(file)
            found.append({"run": str(record["run"]), "error": str(record["error"]), **record})
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{file} is damaged: remove it, and the run is tried again") from None
    return found


def write_options(folder: Path, options: SweepOptions) -> None:
    """Write down what a sweep was started with."""
    write_json(folder / SWEEP, dataclasses.asdict(options))
