"""The comparison of schedules at equal MACs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.scripts import study_schedules
from pyra.scripts.study_schedules import summarised


@pytest.mark.slow  # two calibrations and four searches of the demo backbone
def test_the_study_of_a_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = "--limit 40 --test-limit 20 --seeds 2 --images 2 --trials 1 --rates 0.3,0.5"
    assert study_schedules.main([*arguments.split(), "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert [(line["rate"], line["how"], line["seeds"]) for line in record["summary"]] == [
        (rate, how, 1 if how == "solver" else 2) for rate in (0.3, 0.5) for how in ("solver", "calibrated", "searched")
    ]
    assert all(row["rate"] <= row["real_rate"] < row["rate"] + 0.02 for row in record["rows"])
    assert all(row["drift"] > 0 for row in record["rows"])
    assert record["unmerged"]["agreement"] == 100 and record["unmerged"]["drift"] == 0
    assert "agreement" in capsys.readouterr().out


def test_means_and_spreads() -> None:
    rows = [
        {"rate": 0.5, "how": how, "accuracy": value, "agreement": 2 * value, "drift": 0.1}
        for how, value in (("solver", 50.0), ("calibrated", 50.0), ("calibrated", 54.0))
    ]
    one, two = summarised(rows)
    assert (one["seeds"], one["accuracy"], one["accuracy sd"]) == (1, 50.0, 0.0)
    assert (two["seeds"], two["accuracy"], two["agreement"]) == (2, 52.0, 104.0)
    assert two["accuracy sd"] == pytest.approx(8**0.5)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--rates", "1.5"], ["--test-limit", "0"]])
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        study_schedules.main(arguments)
