"""``pyra predict`` and ``pyra serve`` from the command line, up to where the server starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from colour_model import COLOURS, Model, picture

from pyra.scripts.main import main

MODEL = Model()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export of the model of colours, and images."""
    monkeypatch.chdir(tmp_path)
    Path("export").mkdir()
    Path("export/export.json").write_text("{}")
    metadata = {"labels": json.dumps(COLOURS), "image_size": "8", "mean": "0 0 0", "std": "1 1 1"}

    class Opened(SimpleNamespace):
        def __call__(self, pixel_values: Any) -> Any:
            return MODEL(pixel_values)

    def load(_: Path, *, runtime: str | None, **__: Any) -> Opened:
        return Opened(format="onnx", runtime=runtime or "onnxruntime", metadata=metadata)

    monkeypatch.setattr("pyra.export.load_exported", load)
    Path("images").mkdir()
    for colour in COLOURS:
        Path("images", f"{colour}.png").write_bytes(picture(colour))
    return tmp_path


def test_one_json_object_and_nothing_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["predict", "export", "images", "images/red.png", "--top", "2", "--batch-size", "3", "--runtime", "openvino"]
    assert main(line) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert {key: answer[key] for key in answer if key != "predictions"} == {
        "model": "export", "format": "onnx", "runtime": "openvino"
    }  # fmt: skip
    labels = [(one["image"], one["label"], one["index"]) for one in answer["predictions"]]
    assert labels == [
        (os.path.join("images", "blue.png"), "blue", 2),
        (os.path.join("images", "green.png"), "green", 1),
        (os.path.join("images", "red.png"), "red", 0),
        ("images/red.png", "red", 0),
    ]
    first = answer["predictions"][0]
    assert set(first) == {"image", "label", "index", "probability", "top", "milliseconds"}
    assert first["top"][0] == {"label": "blue", "probability": first["probability"]} and len(first["top"]) == 2


def test_a_broken_image_stops_before_the_model_or_is_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("images/a.png").write_bytes(b"no image")
    MODEL.batches.clear()
    assert main(["predict", "export", "images"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("pyra: error: 1 of 4 images cannot be read: ")
    assert "a.png" in shown.err and shown.err.count("\n") == 1 and MODEL.batches == []
    assert main(["predict", "export", "images", "--skip-broken"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["predictions"]) == 3
    assert answer["skipped"] == [{"image": os.path.join("images", "a.png"), "reason": "not an image in a known format"}]


def test_the_output_is_a_file_then(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "export", "images", "--output", "out/answers.json"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "written to out/answers.json" in shown.err
    assert len(json.loads(Path("out/answers.json").read_text())["predictions"]) == 3
    assert [file.name for file in Path("out").iterdir()] == ["answers.json"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["predict"], "give a folder and at least one image"),
        (["predict", "export"], "give a folder and at least one image"),
        (["predict", "images/red.png", "export"], "images/red.png is a file: the folder of a run or an export comes"),
        (["predict", "export", "images/pink.png"], "no such image: images/pink.png"),
        (["predict", "nothing", "images/red.png"], "nothing does not exist"),
        (["predict", "export", "images", "--output", "images"], "images is a folder: --output names a file"),
        (["predict", "export", "images/red.png", "--output", "images/red.png"], "is one of the images"),
        (["predict", "export", "images", "--top", "0"], "--top must be at least 1, got 0"),
        (["predict", "export", "images", "--topp", "1"], "did you mean '--top'?"),
        (["serve"], "FOLDER is missing"),
        (["serve", "nothing", "--port", "0"], "nothing does not exist"),
        (["serve", "export", "--max-batch", "0", "--max-wait-ms", "-1"], "--max-batch must be above 0"),
        (["serve", "export", "--port", "99999"], "--port must be in 0..65535"),
    ],
)
def test_wrong_lines(home: Path, line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if line[0] == "serve":
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    before = Path("images/red.png").read_bytes()
    assert main(line) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == "" and shown.err.count("\n") == 1
    assert Path("images/red.png").read_bytes() == before


@pytest.mark.parametrize("library", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_missing_library_names_the_extra(
    home: Path, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["serve", "export"]) == 2
    assert f"serving needs {library}: pip install 'pyra-adapt[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predict", "serve"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert f"pyra {verb} runs/a" in capsys.readouterr().out
