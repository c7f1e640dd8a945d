"""The study of rounding and of training rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_language import mixture, write_sums

from pyra.errors import ConfigError
from pyra.scripts import study_qat


def test_rounding_and_training_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = mixture(tmp_path / "tiny", moe_intermediate_size=64)
    root, output = write_sums(tmp_path / "data"), tmp_path / "rows.json"
    given = f"--backbone {backbone} --root {root} --output {output} --limit 4 --seeds 1 --steps 2 --length 32"
    assert study_qat.main([*given.split(), "--rounding", "4:64,2:64", "--trained", "2:64"]) == 0
    record = json.loads(output.read_text())
    first, four, two, control, later, trained = record["rows"]
    assert [row["name"] for row in record["rows"]] == [
        *("original", "rounded", "rounded"),
        *("trained on", "trained on, then rounded", "trained rounded"),
    ]
    assert first["difference"] is None and abs(four["difference"]) < abs(two["difference"])
    assert control["seed"] == 0 and control["bits"] is None and control["nll"] != first["nll"]
    assert trained["over_control"] == pytest.approx(trained["nll"] - later["nll"]) and trained["over_control"] != 0
    assert "trained rounded" in capsys.readouterr().out and str(tmp_path) not in output.read_text()


@pytest.mark.parametrize("wrong", [["--rounding", "4"], ["--trained", "5:64"], ["--seeds", "-1"]])
def test_wrong_options(wrong: list[str]) -> None:
    with pytest.raises(ConfigError):
        study_qat.main(["--backbone", "x", *wrong])
