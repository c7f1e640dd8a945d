"""Finding results below folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyra.errors import DataError
from pyra.files import write_json
from pyra.tasks.reports.collect import collect, is_evaluation


def test_results_at_any_depth_once_and_in_order(tmp_path: Path, make) -> None:
    for seed, folder in enumerate(("a", "b/c/d", "demo/adapted/lora")):
        write_json(tmp_path / folder / "result.json", make(seed=seed))
    found = collect([tmp_path, tmp_path / "b", tmp_path / "a" / "result.json"]).found
    assert [one.row.seed for one in found] == [0, 1, 2]


def test_evaluations_are_read_where_asked_for(tmp_path: Path, make) -> None:
    write_json(tmp_path / "a" / "result.json", make(seed=1))
    write_json(tmp_path / "a" / "evaluation-rate-0.5.json", make(seed=1, rate=0.5))
    write_json(tmp_path / "a" / "options.json", {"seed": 1})
    assert len(collect([tmp_path]).found) == 1
    assert sorted(one.row.rate for one in collect([tmp_path], is_evaluation).found) == [0.0, 0.5]


def test_links_pipes_and_unfinished_outputs_are_left_out(tmp_path: Path, make) -> None:
    write_json(tmp_path / "elsewhere" / "x" / "result.json", make())
    runs = tmp_path / "runs"
    write_json(runs / "a" / ".partial-1" / "result.json", make())
    (runs / "linked").symlink_to(tmp_path / "elsewhere")
    (runs / "circle").symlink_to(runs)
    (runs / "b").mkdir()
    (runs / "b" / "result.json").symlink_to(tmp_path / "elsewhere" / "x" / "result.json")
    (runs / "c" / "result.json").mkdir(parents=True)
    (runs / "d").mkdir()
    os.mkfifo(runs / "d" / "result.json")
    collection = collect([runs])
    assert (collection.found, collection.skipped) == ([], [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b'{"task": "demo"}', "'method' is missing"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"value": NaN}', "NaN is no JSON number"),
        (b'{"value": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'"' + b" " * 2**24 + b'"', "too large"),
    ],
    ids=["binary", "empty", "incomplete", "list", "deep", "nan", "digits", "large"],
)
def test_files_that_are_no_results_are_named_in_one_line(tmp_path: Path, make, content: bytes, reason: str) -> None:
    write_json(tmp_path / "good" / "result.json", make())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_bytes(content)
    collection = collect([tmp_path])
    assert len(collection.found) == 1
    ((file, told),) = collection.skipped
    assert file == tmp_path / "bad" / "result.json" and reason in told
    assert "\n" not in told and len(told) <= 120


def test_every_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one, .*two: no such folder"):
        collect([tmp_path, tmp_path / "one", tmp_path / "two"])
