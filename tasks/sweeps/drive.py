"""A sweep from its options to its last run: what waits is handed out, what ends is written down."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyra.errors import DataError
from pyra.files import read_json
from pyra.tasks.output import held_output
from pyra.tasks.results import read_result
from pyra.tasks.runs import DATA, data_record, resolve_device, stored_options, task_for
from pyra.tasks.sweeps.failures import FAILURES, HALVED, failure_file, forget_failure, kind_of_failure, note_failure
from pyra.tasks.sweeps.folder import JOBS, RUNS, discard_unfinished, is_finished, run_folder, state, write_options
from pyra.tasks.sweeps.grid import Planned, SweepOptions
from pyra.tasks.sweeps.work import Outcome, Work
from pyra.tasks.training import data_options, refuse_output_in_data

_PATIENCE = 0.5  # seconds between two looks at the clock


class Executor(Protocol):
    """Where runs take place."""

    slots: int

    def submit(self, work: Work) -> None:
        """Begin a run."""

    def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
        """Return what has ended since, after at most so long."""

    def stop(self) -> None:
        """End what runs, and everything of the executor."""


@dataclass
class Progress:
    """How far a sweep is.

    Attributes:
        total: runs.
        kept: names of those that were finished before this start.
        finished: names and outcomes of those that finished since.
        failed: names and reasons of those that failed, before and since.
        before: names of those that failed before.
        running: names of those under way.
        took: seconds of this start.
        within: seconds that workers spent within runs, of those that ended since.
        at_once: the most runs that were under way at a time.
        cut: whether the budget ended it.
    """

    total: int
    kept: list[str] = field(default_factory=list)
    finished: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    took: float = 0.0
    within: float = 0.0
    at_once: int = 0
    cut: bool = False

    @property
    def left(self) -> int:
        """Runs that have neither finished nor failed."""
        return self.total - len(self.kept) - len(self.finished) - len(self.failed)

    def seconds_left(self) -> float | None:
        """Guess from what finished since the start; None before anything did."""
        if not self.finished:
            return None
        each = self.within / len(self.finished) or self.took / len(self.finished)
        return each * self.left / max(self.at_once, 1)

    def overhead(self) -> float | None:
        """Return the share of the workers' time that was spent outside of runs; None where nothing finished."""
        return 1 - self.within / (self.took * self.at_once) if self.finished else None


def sweep(options: SweepOptions, tell: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Do what is left of a sweep.

    The folder is all that is remembered: whatever ends this process, the same call goes on. One run that fails does
    not end the others.

    Args:
        options: of the sweep.
        tell: called whenever something has changed, and about twice a second.

    Raises:
        PyraError: for what is wrong with the options, the data or the folder, before any run begins.
    """
    runs = options.runs()
    check(runs)
    with held_output(options.output, "sweep", options.overwrite, resume=not options.overwrite) as folder:
        for name in (RUNS, FAILURES):
            (folder / name).mkdir(exist_ok=True)
        write_options(folder, options)
        now = state(folder, runs, options.retry)
        refuse_other_data(folder, now.finished)
        progress = Progress(len(runs), kept=[planned.name for planned in now.finished])
        progress.before = [planned.name for planned in now.failed]
        progress.failed = dict.fromkeys(progress.before, "failed before")
        tell(progress)
        if now.waiting:
            executor = executor_for(options, folder)
            try:
                _drive(executor, folder, now.waiting, progress, options.budget_seconds(), tell)
            finally:
                executor.stop()
            for planned in now.waiting:  # a run may end while the executor does
                if planned.name in progress.running and is_finished(folder, planned):
                    progress.finished[planned.name] = Outcome(read_result(run_folder(folder, planned)))
            if progress.cut:
                progress.running = []
                tell(progress)
    return progress


def check(runs: list[Planned]) -> None:
    """Find what is wrong with task and output before the first run begins."""
    first = runs[0].options
    resolve_device(first.device)
    refuse_output_in_data(first)
    task_for(first)


def refuse_other_data(folder: Path, finished: list[Planned]) -> None:
    """Raise :class:`DataError` where a finished run was made from other data than its task has now."""
    records: dict[object, Any] = {}
    for planned in finished:
        options = planned.options
        key = data_options(options)
        if key not in records:
            records[key] = data_record(task_for(options))
        own = run_folder(folder, planned)
        if (own / DATA).is_file() and read_json(own / DATA) != records[key]:
            raise DataError(
                f"{own} was made from other data of {records[key]['task']} than there is now: put the data back, give "
                "another --output, or --overwrite"
            )


def executor_for(options: SweepOptions, folder: Path) -> Executor:
    """Return the executor that the options name."""
    if options.executor == "ray":
        from pyra.tasks.sweeps.cluster import RayExecutor

        return RayExecutor(options.workers, options.address, options.cpus, options.gpus)
    if options.executor == "slurm":
        from pyra.tasks.sweeps.cluster import SlurmExecutor

        return SlurmExecutor(options.workers or 64, folder / JOBS, options.cpus, options.gpus)
    import torch

    from pyra.tasks.sweeps.local import LocalExecutor

    device = resolve_device(options.device)
    devices = [str(device)]
    if device.type == "cuda" and device.index is None:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    slots = options.workers or (len(devices) if device.type == "cuda" else 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))  # a list is of nested levels
    threads = (int(asked[0]) if asked else 0) or max(cores // slots, 1)
    return LocalExecutor(slots, devices, threads, folder / JOBS)


def work_of(folder: Path, planned: Planned) -> Work:
    """Return a run as workers take it; one that ran out of memory before goes on with half the batch."""
    options = dataclasses.asdict(planned.options) | {"output": str(run_folder(folder, planned).resolve())}
    work = Work(planned.name, options, planned.rates)
    halved = kind_of_failure(failure_file(folder, planned.name)) == HALVED
    return (work.with_half_the_batch() if halved else None) or work


def _drive(
    executor: Executor,
    folder: Path,
    waiting: list[Planned],
    progress: Progress,
    budget: float | None,
    tell: Callable[[Progress], None],
) -> None:
    started = time.monotonic()
    by_name = {planned.name: planned for planned in waiting}
    queue = deque(work_of(folder, planned) for planned in waiting)
    while queue or progress.running:
        progress.took = time.monotonic() - started
        if budget is not None and progress.took >= budget:
            progress.cut = True
            return
        while queue and len(progress.running) < executor.slots:
            work = queue.popleft()
            executor.submit(work)
            progress.running.append(work.name)
            progress.at_once = max(progress.at_once, len(progress.running))
        for work, outcome in executor.wait(_PATIENCE):
            progress.running.remove(work.name)
            progress.within += outcome.seconds
            planned = by_name[work.name]
            stored = stored_options(planned.options)
            smaller = work.with_half_the_batch() if outcome.kind == "memory" else None
            if smaller is not None:
                discard_unfinished(folder, planned)
                queue.appendleft(smaller)
                note_failure(folder, work.name, HALVED, f"{outcome.error}; it goes on with half the batch", stored)
            elif outcome.kind == "finished":
                forget_failure(folder, work.name)
                progress.finished[work.name] = outcome
            else:
                if work.halved:  # a later try has the whole batch, which does not go on with half of it
                    discard_unfinished(folder, planned)
                note_failure(folder, work.name, outcome.kind, outcome.error, stored)
                progress.failed[work.name] = outcome.error
        progress.took = time.monotonic() - started
        tell(progress)
