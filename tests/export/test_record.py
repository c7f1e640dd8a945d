"""``export.json``: what makes a folder a finished export, and what it may say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError, ExportError
from pyra.export import ExportReport, export_model, load_exported
from pyra.export.record import RECORD, VERSION, read_record

Export = tuple[Path, ExportReport]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the cheapest format; nobody writes to this folder."""
    import timm
    import torch

    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    folder = tmp_path_factory.mktemp("record") / "a"
    model = timm.create_model("vit_tiny_patch16_224", **size).eval()
    export_model(model, folder, "hf", example_input=torch.randn(2, 3, 16, 16), metadata={"note": "ü"})
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "a")
    return tmp_path / "a"


def change(folder: Path, **values: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **values}))


def refusal(folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        load_exported(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_export_says_what_it_is(folder: Path) -> None:
    record = read_record(folder)
    assert (record.format, record.version, record.metadata) == ("hf", VERSION, {"note": "ü"})
    assert record.files == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != RECORD}
    assert record.megabytes == sum(record.files.values()) / 1e6
    assert (record.schedule, record.rate, record.input_shape, record.classes) == (None, None, [3, 16, 16], 5)
    assert {"torch", "timm"} <= record.environment.keys()


def test_a_changed_byte_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model.safetensors is not what was exported" in refusal(folder)
    change(folder, sha256={})  # as an earlier version wrote it
    load_exported(folder)


def test_the_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("# Ours")
    load_exported(folder)
    (folder / "README.md").unlink()
    load_exported(folder)


@pytest.mark.parametrize("threads", [0, "4", 1.5, True])
def test_threads_that_are_no_number(folder: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads must be a positive whole number"):
        load_exported(folder, threads=threads)


def test_without_a_record_nothing_is_finished(folder: Path) -> None:
    (folder / RECORD).unlink()
    assert "no export.json there, so no finished export; give one that `pyra export` wrote" in refusal(folder)
    assert "no finished export" in refusal(folder / "missing")
    assert "no finished export" in refusal(folder / "config.json")


def test_several_exports_below_are_named(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "b")
    assert "it holds several: name one of a, b" in refusal(folder.parent)


@pytest.mark.parametrize("text", ["", "{", '{"rate": NaN}', "[" * 100_000, "\udcff", '"\\ud800"'])
def test_a_record_that_is_no_json(text: str, folder: Path) -> None:
    (folder / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "not a readable JSON file" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"hf"', "{}"])
def test_json_of_another_kind(text: str, folder: Path) -> None:
    (folder / RECORD).write_text(text)
    assert "describes no export" in refusal(folder)


def test_a_newer_version(folder: Path) -> None:
    change(folder, version=VERSION + 1, something="new")
    assert f"version {VERSION + 1} is newer than this library's ({VERSION}): upgrade pyra-adapt" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"formt": "hf"}, "unknown key 'formt' (did you mean 'format'?)"),
        ({"format": "hff"}, "format 'hff' is unknown; there is hf, torch-export"),
        ({"format": ["hf"]}, "format = ['hf'] should be of type str"),
        ({"format": "onnx"}, "files leaves model.onnx out"),
        ({"files": {}}, "files leaves model.safetensors out"),
        ({"files": []}, "files = [] should be of type"),
        ({"files": {"model.safetensors": True}}, "has the size True"),
        ({"files": {"model.safetensors": "1"}}, "has the size '1'"),
        ({"input_shape": [3, 16]}, "input_shape [3, 16] is not channels, height and width"),
        ({"input_shape": [3, 0, 16]}, "input_shape [3, 0, 16] is not"),
        ({"input_shape": ["3", "16", "16"]}, "input_shape"),
        ({"classes": 0}, "classes is 0"),
        ({"metadata": {"labels": ["a"]}}, "metadata"),
        ({"version": "1"}, "version = '1' should be of type int"),
    ],
)
def test_what_a_record_may_not_say(changes: dict[str, Any], said: str, folder: Path) -> None:
    change(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\..\\b/..", "x" * 300, "a\0b"]
)
def test_names_that_are_no_files_of_the_folder(name: str, folder: Path) -> None:
    (folder.parent / "x").write_text("outside")
    record = json.loads((folder / RECORD).read_text())
    change(folder, files={**record["files"], name: 7})
    said = refusal(folder)
    assert "is no file name" in said or "is missing" in said


def test_files_of_other_sizes_and_missing_ones(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    size = (folder / "model.safetensors").stat().st_size
    assert f"model.safetensors has {size} bytes, export.json says {size - 1}: it is damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing, which export.json lists; export again" in refusal(folder)


def test_a_cut_off_copy_is_told_before_a_library_reads_it(exported: Export, tmp_path: Path) -> None:
    shutil.copytree(exported[0], tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.onnx").read_bytes()
    (tmp_path / "cut" / "model.onnx").write_bytes(whole[:1000])
    assert f"has 1000 bytes, export.json says {len(whole)}" in refusal(tmp_path / "cut")
