"""Which point is named, how sure that is, and what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyra.errors import ConfigError, DataError
from pyra.scripts.main import main
from pyra.tasks.comparison import probability_at_least
from pyra.tasks.sweeps.recommend import recommend_from, verdict

Write = Callable[..., Path]


def seeds(write: Write, method: str, right: int, rate: float = 0.0, count: int = 3, **changes: Any) -> None:
    for seed in range(count):
        write(f"{method}-{rate}-{seed}", method, right, rate, seed, **changes)


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    """80 % uncompressed; 79.75, 79 and 75 % at rising rates."""
    seeds(write, "linear", 300)
    seeds(write, "lora", 320)
    seeds(write, "pyra", 319, 0.5)
    seeds(write, "pyra", 316, 0.6)
    seeds(write, "tome", 300, 0.7)
    return tmp_path / "sweep"


def test_the_fastest_within_the_limit_with_its_confidence(folder: Path) -> None:
    found = recommend_from(folder, 1.0)
    assert found.by == "speed-up" and found.reference.name == "lora" and found.nearest is None
    assert found.chosen is not None and found.chosen.point.name == "pyra 0.60"
    sure = found.chosen.confidence
    assert sure is not None and sure.seeds == ["0", "1", "2"] and sure.images == 400
    assert found.chosen.drop == pytest.approx(1.0) == sure.drop and sure.low < 1 < sure.high
    assert 0.4 < sure.probability < 0.75 and "uncertain: within 1 point with a probability" in verdict(found)
    assert found.surest is not None and found.surest.point.name == "pyra 0.50"
    assert found.surest.confidence is not None and found.surest.confidence.probability > 0.95
    assert not any("seed" in note for note in found.notes)


def test_rates_of_an_elastic_run_are_points(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(write, "lora", 320)
    settings = {"lr": 0.1, "elastic": True}
    for seed in range(3):
        write(f"elastic-{seed}", "pyra", 300, 0.7, seed, settings=settings)
        for rate, right in ((0.3, 320), (0.5, 319), (0.7, 300)):
            write(f"elastic-{seed}", "pyra", right, rate, seed, asked=rate, settings=settings)
    found = recommend_from(tmp_path / "sweep", 1.0)
    assert found.chosen is not None and found.chosen.point.name == "pyra 0.50"
    assert found.chosen.confidence is not None and found.chosen.confidence.drop == pytest.approx(0.25)
    assert main(["recommend", str(tmp_path / "sweep"), "--max-drop", "1"]) == 0
    said = capsys.readouterr().out
    run = tmp_path / "sweep" / "runs" / "elastic-0"
    assert f"pyra evaluate {run} --rate 0.5" in said and f"pyra export {run} --rate 0.5 --format onnx" in said
    assert f"run_at_rate({str(run)!r}, 0.5)" in said


@pytest.mark.parametrize(("limit", "name"), [(5.0, "tome 0.70"), (0.99, "pyra 0.50"), (0.25, "pyra 0.50")])
def test_the_limit_decides(folder: Path, limit: float, name: str) -> None:
    for by in ("speed", "macs"):
        found = recommend_from(folder, limit, by)
        assert found.chosen is not None and found.chosen.point.name == name


def test_nothing_qualifies_names_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = recommend_from(folder, 0.0)
    assert found.chosen is None and found.nearest is not None and found.nearest.point.name == "pyra 0.50"
    assert main(["recommend", str(folder), "--max-drop", "0"]) == 1
    out = capsys.readouterr().out
    assert "nothing qualifies: the nearest, pyra 0.50, is 0.25 points below lora (0 points allowed)" in out
    assert "pyra evaluate" not in out
    assert main(["recommend", str(folder), "--max-drop", "0", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["qualifies"] is False and told["recommended"] is None and told["nearest"]["rate"] == 0.5


def test_table_commands_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(folder), "--max-drop", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "reference    lora" in out and "recommended  pyra" in out and "P(drop ≤ 0.5)" in out
    run = folder / "runs" / "pyra-0.5-0"
    assert f"  pyra evaluate {run}\n  pyra export {run} --format onnx\n" in out and f"load_run('{run}')" in out
    assert main(["recommend", str(folder), "--max-drop", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recommended"]["run"] == str(run) and told["recommended"]["drop"] == pytest.approx(0.25)
    assert told["recommended"]["drop_low"] <= 0.25 <= told["recommended"]["drop_high"]
    assert told["recommended"]["commands"]["Evaluate"] == f"pyra evaluate {run}" and told["reference"]["drop"] == 0


def test_few_seeds_few_images_and_missing_answers_are_told(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320, count=1)
    seeds(write, "pyra", 318, 0.5, count=1)
    notes = recommend_from(tmp_path / "sweep", 0.5).notes
    assert any("one seed says nothing" in note for note in notes)
    assert any("400 images tell this drop to within" in note for note in notes)
    (tmp_path / "sweep/runs/lora-0.0-0/predictions.json").unlink()
    found = recommend_from(tmp_path / "sweep", 0.5)
    assert found.chosen is not None and found.chosen.confidence is None
    assert any("no interval, because" in note and "is not there" in note for note in found.notes)
    assert "how sure that is cannot be told" in verdict(found)


def test_only_shared_seeds_are_compared(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320)
    for seed in (1, 2, 5):
        write(f"p{seed}", "pyra", 318, 0.5, seed)
    found = recommend_from(tmp_path / "sweep")
    assert found.chosen is not None and found.chosen.confidence is not None
    assert found.chosen.confidence.seeds == ["1", "2"]
    assert any("the seeds that both have: 1, 2" in note for note in found.notes)


def test_speeds_of_several_devices_give_way_to_speedups(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320)
    seeds(write, "pyra", 320, 0.5)
    seeds(write, "tome", 320, 0.4, environment={"device": "a GPU"}, speed=9000.0, speedup=1.5)
    found = recommend_from(tmp_path / "sweep")
    assert found.by == "speed-up" and found.chosen is not None and found.chosen.point.name == "pyra 0.50"
    assert any("different devices or batches (a CPU at batch 16, a GPU at batch 16)" in note for note in found.notes)


def test_a_busy_machine_is_told_and_speedups_decide(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320, speed=120.0, speedup=1.0)
    seeds(write, "pyra", 320, 0.5, speed=90.0, speedup=1.9)
    seeds(write, "tome", 320, 0.4, speed=130.0, speedup=1.5)
    found = recommend_from(tmp_path / "sweep", 1.0)
    assert found.by == "speed-up" and found.chosen is not None and found.chosen.point.name == "pyra 0.50"
    assert any("timed at 47.4 to 120 a second" in note for note in found.notes)


def test_points_without_speed_are_left_out_and_named(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320)
    seeds(write, "pyra", 320, 0.5)
    seeds(write, "tome", 320, 0.7, speed=None)
    found = recommend_from(tmp_path / "sweep")
    assert found.chosen is not None and found.chosen.point.name == "pyra 0.50"
    assert "left out, without a measured images/s (batch 16): tome 0.70" in found.notes
    assert recommend_from(tmp_path / "sweep", by="macs").chosen.point.name == "tome 0.70"  # type: ignore[union-attr]


def test_merged_but_not_faster(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320)
    seeds(write, "pyra", 320, 0.5, speed=90.0)
    found = recommend_from(tmp_path / "sweep")
    assert found.chosen is None and found.nearest is not None
    assert any("no point that merges tokens is faster than lora" in note for note in found.notes)


def test_without_an_uncompressed_method(write: Write, tmp_path: Path) -> None:
    seeds(write, "pyra", 320, 0.3)
    seeds(write, "pyra", 300, 0.5)
    found = recommend_from(tmp_path / "sweep")
    assert found.reference.name == "pyra 0.30" and found.chosen is not None and found.chosen.point is found.reference
    assert "the best of all is also the fastest" in verdict(found)
    assert any("drops are against the best of all" in note for note in found.notes)


def test_a_point_that_is_no_better_than_the_majority_class_is_called_so(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 100)
    seeds(write, "pyra", 100, 0.5)
    notes = recommend_from(tmp_path / "sweep", 1.0).notes
    said = "is no better than always answering the most frequent class (25.0)"
    assert f"lora {said}" in notes and f"pyra 0.50 {said}" in notes
    seeds(write, "lora", 101)
    seeds(write, "pyra", 101, 0.5)
    assert not any("no better" in note for note in recommend_from(tmp_path / "sweep", 1.0).notes)


def test_an_optimistic_protocol_is_named(write: Write, tmp_path: Path) -> None:
    seeds(write, "lora", 320)
    seeds(write, "pyra", 320, 0.5, protocol="published")
    assert any("chosen on the test split" in note for note in recommend_from(tmp_path / "sweep").notes)


@pytest.mark.parametrize(
    ("rows", "arguments", "parts"),
    [
        ([], [], ["no finished run below", "pyra train"]),
        ([{}], [], ["one point only (lora, seeds 0)", "train other methods or rates"]),
        ([{}, {"task": "other"}], [], ["several tasks or metrics", "demo (test, accuracy)", "--where task=demo"]),
        ([{}, {"metric": "exact_match"}], [], ["--where metric=accuracy"]),
        ([{"metric": "loss"}, {"metric": "loss", "rate": 0.5}], [], ["the metric of these runs is loss"]),
        ([{}, {"test_sha256": "b", "rate": 0.5}], [], ["different images", "--where"]),
        ([{"speed": None}, {"rate": 0.5, "speed": None}], [], ["no run has a measured speed", "--by macs"]),
        ([{}, {"rate": 0.5, "speed": None}], [], ["no run that merges tokens has been measured"]),
        ([{}, {"method": "dora"}], [], ["no run that merges tokens"]),
        ([{}], ["--max-drop", "-1"], ["from 0 up, got -1"]),
        ([{}], ["--max-drop", "nan"], ["from 0 up, got nan"]),
        ([{}], ["--max-drop", "much"], ["--max-drop", "not a number"]),
        ([{}], ["--by", "sped"], ["did you mean 'speed'"]),
        ([{}], ["--where", "method=lorra"], ["did you mean 'lora'"]),
    ],
)
def test_wrong_input_is_one_line(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]],
    arguments: list[str], parts: list[str],
) -> None:  # fmt: skip
    (tmp_path / "sweep").mkdir()
    for number, row in enumerate(rows):
        rest = dict(row)
        write(str(number), rest.pop("method", "lora"), 300, rest.pop("rate", 0.0), **rest)
    assert main(["recommend", str(tmp_path / "sweep"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


def test_no_folder_and_a_missing_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend"]) == 2 and "FOLDER is missing" in capsys.readouterr().err
    with pytest.raises(DataError, match="no such folder"):
        recommend_from(tmp_path / "none")
    with pytest.raises(ConfigError, match="--by"):
        recommend_from(tmp_path, by="luck")


def test_the_probability_is_that_of_a_normal_mean() -> None:
    random = np.random.default_rng(1)
    right = (random.random(4000) < 0.8).astype(np.float32)
    left = np.where(random.random(4000) < 0.1, 1 - right, right).astype(np.float32)
    difference = (left - right).astype(np.float64)
    error = difference.std() / 4000**0.5
    for shift, share in ((0.0, 0.5), (1.0, 0.159), (-1.645, 0.95)):
        found = probability_at_least([left], [right], difference.mean() + shift * error)
        assert found == pytest.approx(share, abs=0.03)
