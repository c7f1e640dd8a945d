"""The refusals and the swap that keep other people's files, and one's own earlier ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyra.errors import OutputError
from pyra.tasks.output import CLAIM_FILE, WRITTEN, staged_output


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder, kind="run", overwrite=False, **files):
    with staged_output(folder, kind, overwrite) as staging:
        for name, text in files.items():
            path = staging / name.replace("__", "/").replace("_json", ".json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_an_output_appears_whole_and_is_not_replaced_by_chance(tmp_path):
    folder = tmp_path / "runs" / "a"
    with staged_output(folder, "run") as staging:
        (staging / "result.json").write_text("1")
        assert not (folder / "result.json").exists()
    assert set(tree(folder)) == {CLAIM_FILE, "result.json"}
    assert json.loads((folder / CLAIM_FILE).read_text())["kind"] == "run"
    with pytest.raises(OutputError, match=r"already holds a run.*--overwrite") as caught:
        write(folder)
    assert str(folder) in str(caught.value)
    assert (folder / "result.json").read_text() == "1"


def test_an_empty_folder_with_a_gitkeep_is_free(tmp_path):
    (tmp_path / ".gitkeep").touch()
    write(tmp_path, result_json="1")
    assert set(tree(tmp_path)) == {".gitkeep", CLAIM_FILE, "result.json"}


def test_overwrite_removes_only_what_a_run_writes(tmp_path):
    folder = tmp_path / "run"
    write(folder, result_json="old", adapter__pyra_config_json="old", evaluation_json="old")
    for name in ("notes.txt", "mine/result.json", ".gitignore", "evaluation-train.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (folder / "export").symlink_to(outside)
    write(folder, overwrite=True, result_json="new")
    assert set(tree(folder)) == {CLAIM_FILE, "result.json", "notes.txt", "mine/result.json", ".gitignore"}
    assert (folder / "result.json").read_text() == "new"
    assert not (folder / "export").is_symlink()
    assert tree(outside) == {"precious": b"x"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_earlier_run_as_it_was(tmp_path, stop):
    folder = tmp_path / "run"
    write(folder, result_json="old")
    before = tree(folder)

    def fail():
        with staged_output(folder, "run", overwrite=True) as staging:
            (staging / "result.json").write_text("half")
            raise stop

    with pytest.raises(stop):
        fail()
    assert tree(folder) == before
    assert sorted(os.listdir(folder)) == sorted(before)


def test_an_error_in_a_new_folder_leaves_nothing(tmp_path):
    def fail():
        with staged_output(tmp_path / "a", "run"):
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert not (tmp_path / "a").exists()


def test_trained_weights_are_kept_after_an_error(tmp_path, capsys):
    def fail():
        with staged_output(tmp_path / "a", "run") as staging:
            (staging / "adapter").mkdir()
            (staging / "adapter" / "weights").write_text("dear")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    (kept,) = (tmp_path / "a").glob(".partial-*")
    assert str(kept) in capsys.readouterr().err
    assert (kept / "adapter" / "weights").read_text() == "dear"
    write(tmp_path / "a", result_json="1")  # and it does not bar the way


def test_two_at_once_lose_nothing(tmp_path):
    with pytest.raises(OutputError, match="another process") as caught, staged_output(tmp_path / "a", "run") as slow:
        (slow / "result.json").write_text("slow")
        write(tmp_path / "a", result_json="fast")
    assert (tmp_path / "a" / "result.json").read_text() == "fast"
    assert (slow / "result.json").read_text() == "slow"
    assert str(slow) in str(caught.value)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_of_another_kind_is_refused(tmp_path, kind, overwrite):
    other = next(k for k in WRITTEN if k != kind)
    write(tmp_path / "a", other, result_json="1")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=rf"holds an? {other}, not an? {kind}"):
        write(tmp_path / "a", kind, overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["adapter/weights", "result.json", CLAIM_FILE])
def test_foreign_files_are_refused_and_kept(tmp_path, overwrite, name):
    """A ``result.json`` of somebody else, or a claim file that says nothing, makes no run."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[]")
    with pytest.raises(OutputError, match="not from pyra") as caught:
        write(tmp_path, overwrite=overwrite)
    assert str(tmp_path) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert tree(tmp_path) == {name: b"[]"}


@pytest.mark.parametrize(
    "kind",
    ["file", "below a file", "root", "home", "above home", "checkout", "link to home", "circle of links", "long name"],
)
def test_places_that_cannot_be_written_are_refused_even_with_overwrite(tmp_path, monkeypatch, kind):
    home = tmp_path / "people" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "file").touch()
    checkout = tmp_path / "code"
    (checkout / ".git").mkdir(parents=True)
    (home / "link").symlink_to(home)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for folder in (home, checkout):
        (folder / "result.json").write_text("x")
    target = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "root": Path("/"), "home": home,
              "above home": home.parent, "checkout": checkout, "link to home": home / "link",
              "circle of links": tmp_path / "circle", "long name": tmp_path / ("x" * 300)}[kind]  # fmt: skip
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"folder|file|cannot write") as caught:
        write(target, overwrite=True)
    assert str(target) in str(caught.value)
    assert tree(tmp_path) == before


def test_own_files_within_an_output_bar_its_replacement(tmp_path):
    write(tmp_path / "a", result_json="old", export__notes="mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"export holds files that are not from pyra \(notes\)"):
        write(tmp_path / "a", overwrite=True, result_json="new")
    assert tree(tmp_path) == before


def test_only_an_export_lies_inside_another_output(tmp_path):
    write(tmp_path / "a", result_json="1")
    with pytest.raises(OutputError, match="inside another output"):
        write(tmp_path / "a" / "b" / "c", result_json="1")
    write(tmp_path / "a" / "export", "export", export_json="1")


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_swap_that_fails_is_taken_back(tmp_path, monkeypatch, failing):
    folder, calls, rename = tmp_path / "a", [], Path.rename
    write(folder, result_json="old", labels_json="old", options_json="old")
    before = tree(folder)

    def rename_or_fail(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(28, "No space left on device", str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(OSError, match="No space"):
        write(folder, overwrite=True, result_json="new", labels_json="new", options_json="new")
    assert len(calls) >= failing
    assert tree(folder) == before


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(Path("~/runs/a"), result_json="1")
    assert (tmp_path / "runs" / "a" / "result.json").exists()


@pytest.mark.parametrize(
    "journal",
    [
        '{"old": ["../victim"], "new": []}', '{"old": [], "new": ["../../victim"]}', '{"old": [".."], "new": []}',
        '{"old":', "[1, 2]", '{"old": "adapter", "new": []}', '{"old": [1], "new": []}',
    ],
)  # fmt: skip
def test_a_journal_that_leads_elsewhere_moves_nothing(journal: str, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "kept").touch()
    staging = folder / ".partial-x"
    (staging / ".replaced").mkdir(parents=True)
    (staging / ".swap.json").write_text(journal)
    (staging / ".pyra-run").write_text('{"kind": "run"}')
    with pytest.raises(OutputError, match="damaged"), staged_output(folder, "run"):
        pass
    assert (victim / "kept").is_file()
    (staging / ".pyra-run").unlink()  # nobody's: not even read
    with staged_output(folder, "run", overwrite=True):
        pass
    assert (victim / "kept").is_file() and (staging / ".swap.json").is_file()


def test_what_a_killed_writer_left_does_not_come_along(tmp_path: Path) -> None:
    with staged_output(tmp_path / "run", "run") as staging:
        (staging / "adapter").mkdir()
        for name in ("result.json", ".result.json.x1", "adapter/adapter_config.json", "adapter/.adapter-x1"):
            (staging / name).write_text("{}")
        (staging / "checkpoints").mkdir()
        (staging / "checkpoints" / "trained.safetensors").touch()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        ".pyra-run", "adapter", "adapter_config.json", "result.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["export/notes", "export/onnx/notes", "export/mine/model.onnx"])
def test_own_files_among_the_exports_of_a_run_bar_its_replacement(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder, result_json="old")
    for format in ("onnx", "hf"):
        write(folder / "export" / format, "export", export_json="1")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = tree(tmp_path)
    told = name.removeprefix("export/") if "onnx/notes" in name else name.split("/")[1]
    with pytest.raises(OutputError, match=rf"export holds files that are not from pyra \({told}\)"):
        write(folder, overwrite=True, result_json="new")
    assert tree(tmp_path) == before


def test_exports_of_a_run_go_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder, result_json="old")
    for format in ("onnx", "hf-0.3"):
        write(folder / "export" / format, "export", export_json="1", measured_json="1", config_json="1")
    write(folder, overwrite=True, result_json="new")
    assert set(tree(folder)) == {CLAIM_FILE, "result.json"} and (folder / "result.json").read_text() == "new"


def test_an_export_is_replaced_by_one_of_another_format_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder, "export", export_json="old", config_json="old", **{"model.safetensors": "old"})
    (folder / "notes").write_text("mine")
    write(folder, "export", overwrite=True, export_json="new", **{"model.onnx": "new"})
    assert set(tree(folder)) == {CLAIM_FILE, "export.json", "model.onnx", "notes"}


def test_a_link_to_an_export_is_no_export_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "a", result_json="old")
    write(tmp_path / "elsewhere", "export", export_json="1")
    (tmp_path / "a" / "export").mkdir()
    (tmp_path / "a" / "export" / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"not from pyra \(onnx\)"):
        write(tmp_path / "a", overwrite=True, result_json="new")
    assert (tmp_path / "elsewhere" / "export.json").read_text() == "1"
