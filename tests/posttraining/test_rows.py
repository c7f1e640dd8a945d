"""Rows from files and from the hub; what is wrong with them is said with file and line."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from tiny_chats import write_lines

from pyra.errors import DataError
from pyra.tasks.posttraining.rows import data_record, read_rows, rows_digest


def test_a_file_is_divided_by_a_fixed_draw(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", ({"n": number} for number in range(40)))
    rows = read_rows(str(file), held_out=0.1)
    assert (rows.name, rows.drawn, len(rows.train), len(rows.test)) == ("chats", True, 36, 4)
    together = sorted(row.values["n"] for row in [*rows.train, *rows.test])
    assert together == list(range(40))
    assert read_rows(str(file), held_out=0.1) == rows
    few = read_rows(str(file), held_out=0.1, limit=3)
    assert len(few.train) == 3 and all(row in rows.train for row in few.train)
    assert len(read_rows(str(file), held_out=0.0001).test) == 1
    assert len(read_rows(str(file), held_out=0.9999).train) == 1


def test_a_folder_has_its_own_test_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"a": 1}])
    write_lines(tmp_path / "test.jsonl", [{"a": 2}, {"a": 3}])
    rows = read_rows(str(tmp_path))
    assert ([row.values for row in rows.train], len(rows.test), rows.drawn) == ([{"a": 1}], 2, False)
    assert rows.test[1].source == f"{tmp_path / 'test.jsonl'}, line 2"


def test_blank_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"a": 1}\n\n  \n{"a": "two\u2028lines"}\n', encoding="utf-8")
    rows = read_rows(str(file))
    assert sorted(row.source for row in [*rows.train, *rows.test]) == [f"{file}, line 1", f"{file}, line 4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"a": 1}\n{"a": \n', r"line 2: not JSON \("),
        (b'{"a": 1}\n[1, 2]\n', "line 2: expected an object, found a list"),
        (b'{"a": 1}\n' + b"[" * 100_000, "line 2: not JSON"),
        (b'{"a": "\xff"}', r"is not UTF-8 \(invalid start byte at byte 7\)"),
        (b'{"a": 1}', "holds one row: two are needed"),
        (b'{"a": 1}\n{"a": ["x\\ud800"]}\n', r"line 2: '\\ud800' is half of a character"),
    ],
)
def test_what_is_wrong_with_a_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.jsonl", "--data none.jsonl is not there: give a .jsonl file, a folder with train.jsonl"),
        ("a/b/c", "--data a/b/c is not there"),
        ("owner/name.jsonl", "is not there"),
        ("owner/name", "owner/name cannot be fetched from the Hugging Face hub"),
    ],
)
def test_data_that_is_not_there(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_rows(given)


def test_other_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"rows are read from JSON lines \(.jsonl\)"):
        read_rows(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"has no train.jsonl \(it holds a.csv\)"):
        read_rows(str(tmp_path))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "train": datasets.Dataset.from_list([{"a": 1, "thinking": None}, {"a": 2, "thinking": True}]),
        "validation": datasets.Dataset.from_list([{"a": 3}]),
    }
    monkeypatch.setattr("pyra.tasks.data.hub.fetch", lambda _: datasets.DatasetDict(found))
    rows = read_rows("owner/chats")
    assert [row.values for row in rows.train] == [{"a": 1}, {"a": 2, "thinking": True}]
    assert (rows.name, rows.source, rows.drawn, rows.test[0].source) == (
        "chats",
        "hub:owner/chats",
        False,
        "owner/chats, validation 0",
    )
    del found["train"]
    with pytest.raises(DataError, match="has no split train, only validation"):
        read_rows("owner/chats")


def test_a_record_knows_what_changed(tmp_path: Path) -> None:
    first = read_rows(str(write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}, {"a": 3}])))
    other = read_rows(str(write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}, {"a": 4}])))
    assert data_record(first) != data_record(other)
    assert rows_digest(first.train) == rows_digest(list(first.train)) != rows_digest(first.train[::-1])
