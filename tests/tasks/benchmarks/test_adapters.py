"""The benchmark of adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyra.scripts import benchmark


def test_rows_of_adapters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = f"adapters --backbone vit_tiny_patch16_224 --image-size 96 --batch-size 2 --rounds 2 --output {output}"
    assert benchmark.main(arguments.split()) == 0
    assert "fixed-rate share" in capsys.readouterr().out
    rows = {row["measured"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "loading an adapter",
        "switching there and back",
        "two training steps, elastic",
        "two training steps, distilled",
    ]
    for name, row in rows.items():
        ((compared, ratio),) = row["ratios"].items()
        assert ratio > 0 and row["p20"] <= row["p50"] <= row["p80"], name
        if row["goal"] is not None:
            assert row["reached"] is (ratio <= row["goal"] if compared.endswith("share") else ratio >= row["goal"])
