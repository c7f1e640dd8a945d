"""The refusals that keep other people's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyra.errors import OutputError
from pyra.tasks.output import CLAIM_FILE, claim_output


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_claim_makes_a_folder_that_cannot_be_claimed_twice(tmp_path):
    folder = claim_output(tmp_path / "runs" / "a")
    assert folder.is_dir()
    with pytest.raises(OutputError, match=r"unfinished run.*--overwrite") as caught:
        claim_output(folder)
    assert str(folder) in str(caught.value)
    (folder / "result.json").write_text("{}")
    with pytest.raises(OutputError, match=r"a finished run.*--overwrite"):
        claim_output(folder)
    assert (folder / "result.json").read_text() == "{}"


def test_claim_accepts_an_empty_folder_with_a_gitkeep(tmp_path):
    (tmp_path / ".gitkeep").touch()
    assert claim_output(tmp_path) == tmp_path
    assert (tmp_path / ".gitkeep").exists()


def test_overwrite_removes_only_what_a_run_writes(tmp_path):
    folder = claim_output(tmp_path / "run")
    for name in ("result.json", "adapter/adapter_model.safetensors", "checkpoints/x", "notes.txt", "mine/result.json",
                 ".gitignore"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (folder / "export").symlink_to(outside)
    claim_output(folder, overwrite=True)
    assert set(tree(folder)) == {CLAIM_FILE, "notes.txt", "mine/result.json", ".gitignore"}
    assert not (folder / "export").is_symlink()
    assert tree(outside) == {"precious": b"x"}


def test_overwrite_honours_marker_and_list(tmp_path):
    for name in ("demo.json", "demo.md", "result.json"):
        (tmp_path / name).write_text("x")
    claim_output(tmp_path, overwrite=True, marker="demo.json", ours=["demo.md"])
    assert set(tree(tmp_path)) == {CLAIM_FILE, "result.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_refused_and_kept(tmp_path, overwrite):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("mine")
    with pytest.raises(OutputError, match="not from a pyra run") as caught:
        claim_output(tmp_path, overwrite)
    assert str(tmp_path) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert tree(tmp_path) == {"adapter/weights": b"mine"}


@pytest.mark.parametrize("kind", ["file", "below a file", "root", "home", "above home", "checkout", "link to home"])
def test_dangerous_places_are_refused_even_with_overwrite(tmp_path, monkeypatch, kind):
    home = tmp_path / "people" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "file").touch()
    checkout = tmp_path / "code"
    (checkout / ".git").mkdir(parents=True)
    (home / "link").symlink_to(home)
    for folder in (home, checkout):
        (folder / "result.json").write_text("x")
    target = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "root": Path("/"), "home": home,
              "above home": home.parent, "checkout": checkout, "link to home": home / "link"}[kind]  # fmt: skip
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"folder|file") as caught:
        claim_output(target, overwrite=True)
    assert str(target) in str(caught.value)
    assert tree(tmp_path) == before
