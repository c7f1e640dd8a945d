"""The one row format of all benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pyra.tasks import timing
from pyra.tasks.benchmarks.rows import Row, table, write_rows

ROW = Row(
    measured="merge",
    implementation="triton",
    backbone="vit_tiny_patch16_224",
    image_size=224,
    batch_size=32,
    dtype="bfloat16",
    unit="us",
    p20=9.0,
    p50=10.0,
    p80=12.0,
    ratios={"eager": 5.25},
    goal=5.0,
    reached=True,
    bytes_moved=1000,
    copy_share=0.614,
    environment={"device": "a GPU", "git_commit": "0123abc"},
)


def test_a_table_shows_what_rows_have() -> None:
    said = table([ROW, replace(ROW, measured="attention", ratios={"mask": 0.5}, goal=None, reached=None)])
    head, _, merge, attention = said.splitlines()
    assert head.split("  ")[0] == "measured" and "/ eager" in head and "/ mask" in head and "detail" not in head
    assert all(
        part in merge for part in ("triton", "vit_tiny_patch16_224 224", "10 us", "61%", "5.25 x", "5.00", "yes")
    )
    assert "0.50 x" in attention and "yes" not in attention
    assert "NO" in table([replace(ROW, reached=False)])


def test_rows_are_read_on_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [ROW, ROW], {"rounds": 5})
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["format"] == 1 and said["options"] == {"rounds": 5} and len(said["rows"]) == 2
    assert Row(**said["rows"][1]) == ROW


def test_jobs_take_turns_and_quantiles_leave_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def job(name: str, durations: list[float]):  # type: ignore[no-untyped-def]
        def run() -> None:
            order.append(name)
            clock[0] += durations.pop(0)

        return run

    jobs = {"a": job("a", [9, 1, 2, 3, 4, 5, 6]), "b": job("b", [7] * 7)}
    found = timing.spreads(jobs, rounds=6)
    assert order == ["a", "b"] * 7
    assert found["a"] == pytest.approx((2.0, 3.5, 5.0)) and found["b"] == (7, 7, 7)
    once = timing.spreads({"c": job("c", [8, 3])}, rounds=1)
    assert once["c"] == (3, 3, 3)
