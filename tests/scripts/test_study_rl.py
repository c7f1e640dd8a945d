"""The study of FiberPO beside GRPO, in small: rows of equal rollouts, a picture, and going on where it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.scripts.study_rl import main

_SMALL = ["--seeds", "1", "--supervised", "2", "--rollouts", "1", "--updates", "1", "--batch-size", "4", "--group", "2",
          "--problems", "20", "--test-problems", "4"]  # fmt: skip


def test_ways_begin_at_the_same_weights_and_are_not_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    ways = ["--ways", "algorithm: grpo; algorithm: fiberpo, fiber_eps: 0.1", "--output", str(file)]
    assert main([*_SMALL, *ways]) == 0
    first = json.loads(file.read_text())
    assert [row["name"] for row in first["rows"]] == ["algorithm: grpo", "algorithm: fiberpo, fiber_eps: 0.1"]
    assert len({row["weights_sha256"] for row in first["rows"]}) == 1
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*_SMALL, *ways]) == 0
    assert json.loads(file.read_text()) == first
    assert "algorithm: fiberpo, fiber_eps: 0.1" in capsys.readouterr().out


def test_options_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown key 'algoritm'"):
        main(["--ways", "algoritm: grpo"])
