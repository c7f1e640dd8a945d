"""Result schema, atomic files, provenance, and the refusals that keep other people's files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from pyra.errors import ConfigError, DataError, OutputError
from pyra.tasks import results
from pyra.tasks.results import CLAIM_FILE, RunResult, claim_output, environment, read_result, write_json

FIXED = {
    "task", "method", "metric", "value", "macs", "schedule", "rate", "trained_parameters", "images_per_second",
    "speedup", "seed",
}  # fmt: skip


def make(**changes):
    row = RunResult(
        task="demo", method="pyra", metric="accuracy", value=0.604, macs=5_080_000_000, schedule=[12, 0], rate=0.71,
        trained_parameters=302_602, seed=3, images_per_second=61.5, speedup=3.02, plain_macs=17_580_000_000,
        environment={"python": "3.12"},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fixed_names_and_round_trip_through_a_file(tmp_path):
    row = make(images_per_second=None, speedup=None)
    assert set(row.to_dict()) >= FIXED
    assert row.to_dict()["schema_version"] == 1
    write_json(tmp_path / "result.json", row)
    assert read_result(tmp_path) == row
    assert read_result(tmp_path) != make()


def test_to_dict_shares_nothing_with_the_row():
    row = make()
    row.to_dict()["schedule"].append(9)
    assert row.schedule == [12, 0]


def test_from_dict_lists_every_problem():
    data = make().to_dict() | {"schema_version": 2, "sped_up": 1, "seed": True, "schedule": [1, "a"], "epochs": "3"}
    del data["task"]
    with pytest.raises(ConfigError) as caught:
        RunResult.from_dict(data)
    for part in ("version 2", "upgrade", "'sped_up' (did you mean 'speedup'", "'task' is missing", "seed = True",
                 "schedule = [1, 'a']", "epochs = '3'"):  # fmt: skip
        assert part in str(caught.value)
    assert RunResult.from_dict(make().to_dict() | {"value": 1}).value == 1


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [(None, DataError, "finished run"), ("{", DataError, "not JSON"), ("[]", ConfigError, "JSON object"),
     ('{"task": "demo"}', ConfigError, "'method' is missing")],
)  # fmt: skip
def test_read_result_names_the_file(tmp_path, content, error, part):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(error, match=part) as caught:
        read_result(tmp_path)
    assert str(tmp_path / "result.json") in str(caught.value)


def test_write_json_takes_scalars_and_makes_an_ordinary_file(tmp_path):
    rows = [make(), {"tensor": torch.tensor(2), "numpy": np.float32(0.5), "path": Path("a"), "text": "é"}]
    path = write_json(tmp_path / "new" / "rows.json", rows)
    assert json.loads(path.read_text(encoding="utf-8"))[1] == {"tensor": 2, "numpy": 0.5, "path": "a", "text": "é"}
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_write_json_failing_keeps_the_old_file(tmp_path, value, error):
    path = write_json(tmp_path / "a.json", 1)
    with pytest.raises(error):
        write_json(path, {"x": value})
    assert tree(tmp_path) == {"a.json": b"1\n"}


def test_write_interrupted_before_the_rename_leaves_no_trace(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", 1)

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_json(path, 2)
    assert tree(tmp_path) == {"a.json": b"1\n"}


def test_environment_is_json_and_says_where():
    here = environment()
    assert {"python", "torch", "timm", "transformers", "peft", "pyra", "device", "threads", "git_commit"} <= set(here)
    assert here["torch"] == torch.__version__ or here["torch"] in torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["device"]
    assert datetime.datetime.fromisoformat(here["date"]).utcoffset() == datetime.timedelta(0)
    json.dumps(here)
    assert environment("cpu").keys() == here.keys()


def test_commit_only_from_a_pyra_checkout(tmp_path, monkeypatch):
    code = tmp_path / "tasks" / "results.py"
    monkeypatch.setattr(results, "__file__", str(code))
    (tmp_path / ".git").mkdir()
    assert results._commit() == (None, None)
    (tmp_path / "pyproject.toml").write_text('name = "pyra-adapt"')

    def git(command, **_):
        assert command[:3] == ["git", "-C", str(tmp_path)]
        return type("Run", (), {"stdout": "abc123\n" if "rev-parse" in command else " M a\n"})

    monkeypatch.setattr(results.subprocess, "run", git)
    assert results._commit() == ("abc123", True)


def test_claim_makes_a_folder_that_cannot_be_claimed_twice(tmp_path):
    folder = claim_output(tmp_path / "runs" / "a")
    assert folder.is_dir()
    with pytest.raises(OutputError, match=r"unfinished run.*--overwrite") as caught:
        claim_output(folder)
    assert str(folder) in str(caught.value)
    write_json(folder / "result.json", make())
    with pytest.raises(OutputError, match=r"a finished run.*--overwrite"):
        claim_output(folder)
    assert read_result(folder) == make()


def test_claim_accepts_an_empty_folder_with_a_gitkeep(tmp_path):
    (tmp_path / ".gitkeep").touch()
    assert claim_output(tmp_path) == tmp_path
    assert (tmp_path / ".gitkeep").exists()


def test_overwrite_removes_only_what_a_run_writes(tmp_path):
    folder = claim_output(tmp_path / "run")
    for name in ("result.json", "adapter/adapter_model.safetensors", "checkpoint-10/x", "notes.txt", "mine/result.json",
                 ".gitignore"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
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
