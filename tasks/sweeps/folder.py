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
import shutil
from pathlib import Path

from pyra.errors import PyraError
from pyra.files import write_json
from pyra.tasks.output import unfinished
from pyra.tasks.results import RESULT_FILE, evaluation_file, read_result_file
from pyra.tasks.sweeps.failures import HALVED, failure_file, kind_of_failure
from pyra.tasks.sweeps.grid import Planned, SweepOptions

SWEEP, RUNS, JOBS = "sweep.json", "runs", "jobs"


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
    return all(holds_result(own / file) for file in files)


def holds_result(file: Path) -> bool:
    """Whether a file is there and holds a result: one that was damaged is made again, or told."""
    try:
        read_result_file(file)
    except PyraError:
        return False
    return True


def state(folder: Path, runs: list[Planned], retry: bool = False) -> State:
    """Look at a folder; with ``retry`` what failed waits again."""
    found = State([], [], [])
    for planned in runs:
        if is_finished(folder, planned):
            found.finished.append(planned)
        elif not retry and kind_of_failure(failure_file(folder, planned.name)) not in (None, HALVED):
            found.failed.append(planned)
        else:
            found.waiting.append(planned)
    return found


def discard_unfinished(folder: Path, planned: Planned) -> None:
    """Remove what was trained of a run that is to begin anew with other options."""
    for entry in unfinished(run_folder(folder, planned), "run"):
        shutil.rmtree(entry)


def write_options(folder: Path, options: SweepOptions) -> None:
    """Write down what a sweep was started with."""
    write_json(folder / SWEEP, dataclasses.asdict(options))
