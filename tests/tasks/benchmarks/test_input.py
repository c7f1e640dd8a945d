"""The benchmark of the input pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.scripts import benchmark


def test_rows_of_the_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert benchmark.main(f"input --backbones demo --batch-size 2 --rounds 3 --output {output}".split()) == 0
    assert "in-memory share" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [row["measured"] for row in rows] == ["training step, lora"] * 2 + ["training step, pyra, high"] * 2
    assert [row["implementation"] for row in rows] == ["pipeline", "pipeline, RandAugment"] * 2
    for row in rows:
        share = row["ratios"]["in-memory share"]
        assert row["backbone"] == "demo" and row["goal"] == 1.05 and row["reached"] is (share <= 1.05)
        assert row["p20"] <= row["p50"] <= row["p80"] and "ms to make a batch" in row["detail"]


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="--rounds must be at least 1"):
        benchmark.main(["input", "--rounds", "0"])
