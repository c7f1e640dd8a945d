"""A sweep as it goes on: a table that is drawn again in place on a terminal, a line a run elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from tabulate import tabulate

from pyra.tasks.reports.table import metric_name, value_text
from pyra.tasks.results import read_result
from pyra.tasks.sweeps.drive import Progress
from pyra.tasks.sweeps.folder import RUNS
from pyra.tasks.sweeps.grid import Planned

_REDRAW = 1.0  # seconds


class Display:
    """Shows progress; give it to :func:`pyra.tasks.sweeps.drive.sweep`.

    Args:
        runs: of the sweep.
        folder: of the sweep, in which the scores of what was finished before are read.
        out: where to, standard error by default; a terminal is redrawn.
    """

    def __init__(self, runs: list[Planned], folder: Path, out: TextIO | None = None) -> None:
        self._folder, self._before = folder, dict[str, float]()
        self._labels = {planned.name: _label(planned) for planned in runs}
        self._out = out or sys.stderr
        self._live = self._out.isatty()
        self._lines, self._drawn, self._said = 0, 0.0, set[str]()
        self._begun = False

    def __call__(self, progress: Progress) -> None:
        """Show what has changed."""
        if not self._begun:
            self._begun = True
            kept = f", {len(progress.kept)} of them finished before" if progress.kept else ""
            if progress.before:
                kept += f", {len(progress.before)} failed before (--retry tries them again)"
                self._said.update(progress.before)
            if self._live:
                self._before = {name: read_result(self._folder / RUNS / name).value for name in progress.kept}
            print(f"{progress.total} run{'s' * (progress.total != 1)}{kept}", file=self._out, flush=True)
        if self._live:
            if time.monotonic() - self._drawn >= _REDRAW or not progress.left:
                self._draw(progress)
            return
        for name, outcome in progress.finished.items():
            if name not in self._said and outcome.result is not None:
                metric, value = outcome.result.metric, outcome.result.value
                self._say(name, f"{metric_name(metric)} {value_text(metric, value)}", progress)
        for name, reason in progress.failed.items():
            if name not in self._said:
                self._say(name, f"FAILED: {reason}", progress)

    def _say(self, name: str, what: str, progress: Progress) -> None:
        self._said.add(name)
        done = progress.total - progress.left
        print(f"[{done}/{progress.total}] {name}: {what}; {left(progress)}", file=self._out, flush=True)

    def _draw(self, progress: Progress) -> None:
        values = {**self._before}
        values |= {name: one.result.value for name, one in progress.finished.items() if one.result is not None}
        rows: list[list[object]] = []
        open_rows: list[list[object]] = []
        for label in dict.fromkeys(self._labels.values()):
            names = [name for name in self._labels if self._labels[name] == label]
            done = [values[name] for name in names if name in values]
            under_way = sum(name in progress.running for name in names)
            failed = sum(name in progress.failed for name in names)
            mean = f"{100 * sum(done) / len(done):.1f}" if done else ""
            rows.append([*label, f"{len(done)}/{len(names)}", under_way or "", failed or "", mean])
            open_rows += rows[-1:] if len(done) + failed < len(names) else []
        headers = ["method", "rate", "done", "running", "failed", "mean (%)"]
        size = shutil.get_terminal_size()
        room = max(size.lines - 5, 3)
        if len(rows) > room:  # what is under way or still to come
            rows = (open_rows or rows)[:room]
        lines = [*tabulate(rows, headers, disable_numparse=True).splitlines(), left(progress)]
        if self._lines:
            self._out.write(f"\x1b[{self._lines}F\x1b[J")
        self._out.write("".join(f"{line[: size.columns - 1]}\n" for line in lines))
        self._out.flush()
        self._lines, self._drawn = len(lines), time.monotonic()


def left(progress: Progress) -> str:
    """Say how much is left."""
    seconds = progress.seconds_left()
    if not progress.left:
        return f"done in {duration(progress.took)}"
    about = "" if seconds is None else f", about {duration(seconds)}"
    return f"{progress.left} left{about}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 45 s, 12 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _label(planned: Planned) -> tuple[str, str]:
    rate = planned.options.rate
    return planned.options.label, "" if rate is None else str(rate)
