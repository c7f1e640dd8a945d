"""The demonstration writes everything it says, on a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pyra.tasks.demonstration import METHODS, DemoSettings, demonstrate
from pyra.tasks.output import WRITTEN


@pytest.mark.slow  # four trainings and an ONNX export
def test_demonstration(tmp_path: Path) -> None:
    outcome = demonstrate(tmp_path / "demo", DemoSettings(epochs=1, limit=40, device="cpu"))
    for name in WRITTEN["demo"]:
        assert (tmp_path / "demo" / name).exists(), name
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["plain_macs"] / row["macs"] == pytest.approx(3.4, abs=0.02) for row in rows[2:])
    assert rows[1]["speedup"] == 1.0
    assert outcome.exported.report.comparison.relative_difference < 1e-3
    assert (tmp_path / "demo" / "export" / "model.onnx").is_file()
    with Image.open(tmp_path / "demo" / "merged_tokens.png") as picture:
        assert min(picture.size) > 400
