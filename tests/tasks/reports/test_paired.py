"""Paired differences from what runs answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyra.errors import ConfigError
from pyra.files import write_json
from pyra.tasks.reports.collect import collect
from pyra.tasks.reports.groups import group
from pyra.tasks.reports.paired import compare, comparison_table

LABELS = np.random.default_rng(0).integers(10, size=200)


def write(make, folder: Path, method: str, accuracy: float, seed: int, **changes: Any) -> Path:
    random = np.random.default_rng([seed, len(method)])
    wrong = random.random(len(LABELS)) > accuracy
    predictions = np.where(wrong, (LABELS + 1) % 10, LABELS)
    row = make(method, float((predictions == LABELS).mean()), seed=seed, **({"test_sha256": "a"} | changes))
    home = folder / f"{method}-{seed}-{len(list(folder.iterdir()))}"
    write_json(home / "result.json", row)
    told = {"labels": LABELS.tolist(), "predictions": predictions.tolist(), "split": "test", "sha256": row.test_sha256}
    write_json(home / "predictions.json", told)
    return home


def compared(folder: Path, method: str = "lora"):
    return compare(group(collect([folder]).found)[0], method)


def test_a_difference_uses_the_seeds_that_both_have(tmp_path: Path, make) -> None:
    for seed in range(3):
        write(make, tmp_path, "lora", 0.8, seed)
        write(make, tmp_path, "pyra", 0.6, seed + 1, rate=0.7, protocol="published")
    (one,), notes = compared(tmp_path)
    assert one.draws == [(1, 0), (2, 0)] and one.images == 200 and notes == []
    rows = {(found.row.method, found.row.seed): found.row.value for found in collect([tmp_path]).found}
    expected = np.mean([rows["pyra", seed] - rows["lora", seed] for seed in (1, 2)])
    assert one.difference.difference == pytest.approx(expected)
    assert one.difference.low < one.difference.difference < one.difference.high < 0
    table = comparison_table([one], "lora")
    cells = dict(zip(table.headers, table.cells[0], strict=True))
    assert float(cells["difference (points)"]) == pytest.approx(100 * expected, abs=0.06) and cells["seeds"] == "1,2"
    assert "chosen on the test split" in cells["protocol"] and " to -" in cells["95 % interval"]


def test_a_reference_chosen_on_the_test_split_is_told(tmp_path: Path, make) -> None:
    write(make, tmp_path, "lora", 0.8, 0, protocol="published")
    write(make, tmp_path, "pyra", 0.6, 0, protocol="fixed")
    _, (note,) = compared(tmp_path)
    assert note == "lora, which pyra on demo is compared with, was chosen on the test split"


def test_of_several_references_the_one_of_the_same_rate(tmp_path: Path, make) -> None:
    write(make, tmp_path, "tome", 0.7, 0, rate=0.5)
    write(make, tmp_path, "tome", 0.6, 0, rate=0.7)
    write(make, tmp_path, "pyra", 0.9, 0, rate=0.7)
    write(make, tmp_path, "lora", 0.9, 0)
    (one,), (note,) = compared(tmp_path, "tome")
    assert one.theirs.row.rate == 0.7
    assert note.startswith("lora (rate 0.00) on demo is not compared with tome: 2 rows of it differ")


def change(home: Path, **values: Any) -> None:
    stored = json.loads((home / "predictions.json").read_text()) | values
    (home / "predictions.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sha256": "b"}, "not of the images"),
        ({"sha256": None}, "not of the images"),
        ({"split": "validation"}, "not of the images"),
        ({"labels": None}, "no class indices"),
        ({"labels": ["1"] * 200}, "no class indices"),
        ({"predictions": [True] * 200}, "no class indices"),
        ({"predictions": [2**70] * 200}, "no class indices"),
        ({"predictions": [-1] * 200}, "no class indices"),
        ({"predictions": [0]}, "200 labels and 1 predictions"),
        ({"labels": [], "predictions": []}, "0 labels"),
        ({"predictions": [0] * 200}, "result.json beside it says"),
    ],
)
def test_answers_that_do_not_belong_to_the_result_are_refused(
    tmp_path: Path, make, values: dict[str, Any], reason: str
) -> None:
    write(make, tmp_path, "lora", 0.8, 0)
    change(write(make, tmp_path, "pyra", 0.6, 0), **values)
    made, (note,) = compared(tmp_path)
    assert made == [] and reason in note and note.startswith("pyra (rate 0.00) on demo is not compared with lora")
    assert comparison_table(made, "lora").cells == []


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "is not there"), (b"\xff", "cannot be read"), (b"3", "holds no")]
)
def test_answers_that_cannot_be_read(tmp_path: Path, make, content: bytes | None, reason: str) -> None:
    write(make, tmp_path, "lora", 0.8, 0)
    file = write(make, tmp_path, "pyra", 0.6, 0) / "predictions.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    made, (note,) = compared(tmp_path)
    assert made == [] and reason in note


def test_labels_in_another_order_are_refused(tmp_path: Path, make) -> None:
    write(make, tmp_path, "lora", 0.8, 0)
    home = write(make, tmp_path, "pyra", 0.6, 0)
    stored = json.loads((home / "predictions.json").read_text())
    change(home, labels=stored["labels"][::-1], predictions=stored["predictions"][::-1])
    assert "labels in their predictions.json differ" in compared(tmp_path)[1][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_sha256": "b"}, "another test sha256"),
        ({"backbone": "other"}, "another backbone"),
        ({"task": "other"}, "no run of it on that task"),
        ({"metric": "f1"}, "another metric"),
    ],
)
def test_runs_of_other_images_or_backbones_are_no_pairs(
    tmp_path: Path, make, changes: dict[str, Any], reason: str
) -> None:
    write(make, tmp_path, "lora", 0.8, 0)
    write(make, tmp_path, "pyra", 0.6, 0, **changes)
    made, (note,) = compared(tmp_path)
    assert made == [] and reason in note


def test_no_common_seed_no_accuracy_no_such_method(tmp_path: Path, make) -> None:
    write(make, tmp_path, "lora", 0.8, 0, metric="f1")
    write(make, tmp_path, "pyra", 0.6, 1, metric="f1")
    assert "right or wrong" in compared(tmp_path)[1][0]
    other = tmp_path / "other"
    other.mkdir()
    write(make, other, "lora", 0.8, 0)
    write(make, other, "pyra", 0.6, 1)
    assert "share no seed (1 and 0)" in compared(other)[1][0]
    with pytest.raises(ConfigError, match=r"no run of that method \(did you mean 'lora'\?\); there are lora, pyra"):
        compared(other, "lra")
