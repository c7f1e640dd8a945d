"""A sweep as it goes on: a table that is drawn again in place on a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tabulate import tabulate

from pyra.tasks.sweeps.drive import Progress
from pyra.tasks.sweeps.grid import Planned

_REDRAW = 1.0  # seconds


class Display:
    """Shows progress; give it to :func:`pyra.tasks.sweeps.drive.sweep`.

    Args:
        runs: of the sweep.
        out: where to; a terminal is redrawn.
    """

    def __init__(self, runs: list[Planned], out: TextIO = sys.stderr) -> None:
        self._labels = {planned.name: _label(planned) for planned in runs}
        self._names = {planned.name for planned in runs}
        self._out, self._live = out, out.isatty()
        self._lines, self._drawn, self._said = 0, 0.0, set[str]()
        self._begun = False

    def __call__(self, progress: Progress) -> None:
        """Show what has changed."""
        if not self._begun:
            self._begun = True
            kept = f", {progress.kept} of them finished before" if progress.kept else ""
            print(f"{progress.total} run{'s' * (progress.total != 1)}{kept}", file=self._out, flush=True)
        if self._live:
            if time.monotonic() - self._drawn >= _REDRAW or not progress.left:
                self._draw(progress)
            return
        for name, outcome in progress.finished.items():
            if name not in self._said and outcome.result is not None:
                self._say(name, f"{100 * outcome.result.value:.1f} {outcome.result.metric}", progress)
        for name, reason in progress.failed.items():
            if name not in self._said:
                self._say(name, f"FAILED: {reason}", progress)

    def _say(self, name: str, what: str, progress: Progress) -> None:
        self._said.add(name)
        done = progress.kept + len(progress.finished) + len(progress.failed)
        print(f"[{done}/{progress.total}] {name}: {what}; {left(progress)}", file=self._out, flush=True)

    def _draw(self, progress: Progress) -> None:
        rows = []
        for label in dict.fromkeys(self._labels.values()):
            names = [name for name in self._names if self._labels[name] == label]
            done = [progress.finished[name].result for name in names if name in progress.finished]
            values = [result.value for result in done if result is not None]
            under_way = sum(name in progress.running for name in names)
            failed = sum(name in progress.failed for name in names)
            mean = f"{100 * sum(values) / len(values):.1f}" if values else ""
            rows.append([*label, len(names), len(values), under_way or "", failed or "", mean])
        headers = ["method", "rate", "runs", "done now", "running", "failed", "mean (%)"]
        text = tabulate(rows, headers) + f"\n{left(progress)}"
        if self._lines:
            self._out.write(f"\x1b[{self._lines}F\x1b[J")
        self._out.write(text + "\n")
        self._out.flush()
        self._lines, self._drawn = text.count("\n") + 1, time.monotonic()


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
