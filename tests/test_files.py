"""A file is either the old one or the whole new one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pyra import files
from pyra.files import atomic_path, write_json, write_text


@dataclasses.dataclass
class Point:
    x: int


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_json_takes_dataclasses_and_makes_a_file_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    write_json(path, [Point(2), {"text": "é"}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"x": 2}, {"text": "é"}]
    assert "é" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError), (Point, TypeError)])
def test_what_is_not_json_is_refused_and_keeps_the_old_file(
    tmp_path: Path, value: object, error: type[Exception]
) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"x": value})
    assert contents(tmp_path) == {"a.json": "1\n"}


def test_text_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("fsync", "replace"):
        plain = getattr(files.os, name)
        monkeypatch.setattr(files.os, name, lambda *args, n=name, f=plain: (done.append(n), f(*args)))
    write_text(tmp_path / "a.txt", "new")
    assert done == ["fsync", "replace"] and contents(tmp_path) == {"a.txt": "new"}


def test_a_full_disk_names_the_file(tmp_path: Path, tiny_disk: None) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match=r"too large.*a\.txt"):
        write_text(tmp_path / "a.txt", "new" * 10_000)
    assert contents(tmp_path) == {"a.txt": "old"}


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": "old"}
