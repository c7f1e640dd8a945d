"""What is shown of a sweep as it goes on, on terminals of any width and in files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from pyra.files import write_json
from pyra.tasks.results import RESULT_FILE, RunResult
from pyra.tasks.sweeps import display
from pyra.tasks.sweeps.display import Display
from pyra.tasks.sweeps.drive import Progress
from pyra.tasks.sweeps.grid import SweepOptions
from pyra.tasks.sweeps.work import Outcome

RUNS = SweepOptions(method="lora,pyra", rate="0.3,0.5", seeds=2).runs()
RESULT = RunResult(
    task="demo", method="pyra", metric="accuracy", value=0.5, macs=1, schedule=[0], rate=0.3, trained_parameters=1,
    seed=0,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress() -> Progress:
    kept, done, failed = RUNS[0].name, RUNS[1].name, RUNS[2].name
    return Progress(len(RUNS), [kept], {done: Outcome(RESULT, seconds=8.0)}, {failed: "out of luck"}, took=9.0,
                    within=8.0, at_once=1)  # fmt: skip


@pytest.mark.parametrize("columns", [20, 40, 120])
def test_no_line_is_wider_than_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that wraps would count as two, and the table be drawn over what stands above it."""
    write_json(tmp_path / "runs" / RUNS[0].name / RESULT_FILE, RESULT)
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    out = Terminal()
    Display(RUNS, tmp_path, out)(progress())
    lines = out.getvalue().splitlines()
    assert lines[0] == f"{len(RUNS)} runs, 1 of them finished before" and len(lines) > 5
    assert all(len(line) < columns for line in lines[1:])


def test_what_was_finished_before_counts_in_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "runs" / RUNS[0].name / RESULT_FILE, RESULT)
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: os.terminal_size((120, 24)))
    out = Terminal()
    Display(RUNS, tmp_path, out)(progress())
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("lora")]
    assert line.split() == ["lora", "1/2", "50.0"]


def test_a_short_terminal_shows_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = SweepOptions(method="pyra", rate="0:0.8:0.05").runs()
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: os.terminal_size((80, 10)))
    done = {one.name: Outcome(RESULT) for one in runs[:6]}
    out = Terminal()
    Display(runs, tmp_path, out)(Progress(len(runs), finished=done))
    rates = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("pyra")]
    assert rates == [str(one.options.rate) for one in runs[6:11]]


def test_a_file_gets_a_line_a_run_once(tmp_path: Path) -> None:
    out = io.StringIO()
    show = Display(RUNS, tmp_path, out)
    show(progress())
    show(progress())
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "50.0" in lines[1] and lines[2].startswith("[3/6]") and "FAILED: out of luck" in lines[2]
