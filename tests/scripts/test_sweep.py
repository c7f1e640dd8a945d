"""``pyra sweep`` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyra.scripts.main import main

TINY = ["--limit", "8", "--epochs", "1", "--batch-size", "4", "--image-size", "32", "--device", "cpu"]


@pytest.mark.slow  # a grid of trainings
def test_a_sweep_its_report_and_what_a_dry_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--method", "linear,pyra", "--rate", "0.5", *TINY, "--output", str(tmp_path / "sweep")]
    assert main([*line, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 runs are left" in said and "GB" in said and not (tmp_path / "sweep").exists()
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "[2/2]" in shown.err and "pyra recommend" in shown.out and "linear" in shown.out
    for name in ("report.html", "report.md", "front.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 0
    assert main([*line, "--dry-run"]) == 0
    assert "0 of 2 runs are left" in capsys.readouterr().out


@pytest.mark.slow  # a sweep of trainings
def test_a_budget_that_is_spent_is_a_status_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--method", "linear,pyra", "--rate", "0.5", *TINY, "--output", str(tmp_path / "sweep")]
    assert main([*line, "--budget", "0.1s"]) == 3
    assert "the budget is used up after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rate", "0.5,0.5"], "holds 0.5 twice"),
        (["--method", "tome"], "needs --rate"),
        (["--rate", "1.2"], "[0, 1), got 1.2"),
        (["--rate", "0.5", "--budget", "a while"], "--budget must be a duration"),
    ],
)
def test_wrong_lines(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *flags]) == 2
    assert said in capsys.readouterr().err
