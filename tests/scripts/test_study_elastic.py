"""The comparison of elastic adapters with those of one rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyra.errors import ConfigError
from pyra.scripts import study_elastic


def test_a_difference_and_its_interval() -> None:
    random = np.random.default_rng(1)
    fixed = [(random.random(400) < 0.5).astype(np.float32) for _ in range(3)]
    better = [np.maximum(one, random.random(400) < 0.2) for one in fixed]
    found = study_elastic._compared(better, fixed)
    assert found["difference"] == pytest.approx(100 * (np.mean(better) - np.mean(fixed)), abs=1e-3)
    assert 0 < found["low"] < found["difference"] < found["high"] < 20
    same = study_elastic._compared(fixed, fixed)
    assert same["difference"] == same["low"] == same["high"] == 0 and same["test images"] == 400


def test_the_study_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = f"--seeds 1 --epochs 0.02 --rates 0.2,0.4 --runs {tmp_path / 'runs'} --output {output}"
    assert study_elastic.main(arguments.split()) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["rate"] for row in rows] == [0.2, 0.4] and "difference" in capsys.readouterr().out
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


@pytest.mark.parametrize("arguments", [["--rates", "0.3"], ["--rates", "0.3,half"], ["--seeds", "0"]])
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        study_elastic.main(arguments)
