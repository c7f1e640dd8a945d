"""Runs that were really trained: their pictures, and the commands that go on with them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from PIL import Image

from pyra.files import read_json
from pyra.scripts.main import main
from pyra.tasks.options import RunOptions
from pyra.tasks.results import read_result, read_result_file
from pyra.tasks.sweeps.commands import commands
from pyra.tasks.sweeps.report import write_report
from pyra.tasks.training import train


@pytest.mark.slow
def test_pictures_and_commands_of_trained_runs(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, method, rate in (("a", "lora", None), ("b's", "pyra", 0.4)):
        train(
            RunOptions(
                backbone=str(tiny_backbone), method=method, rate=rate, epochs=1, limit=30, batch_size=8, device="cpu",
                output=str(tmp_path / "sweep" / name),
            )
        )  # fmt: skip
    page = write_report(tmp_path / "sweep", pictures=True)
    (picture,) = (tmp_path / "sweep" / "pictures").iterdir()
    assert picture.name == "pyra-0.40.png" and "merged tokens: pyra-0.40" in page.read_text(encoding="utf-8")
    with Image.open(picture) as image:
        assert image.width > image.height > 2 * 224

    run = tmp_path / "sweep" / "b's"
    assert read_result(run).unit == "images"
    evaluate, export, use = commands("images", run, 0.3)
    assert main(shlex.split(evaluate.text)[1:]) == 0
    assert abs(read_result_file(run / "evaluation-rate-0.3.json").rate - 0.3) < 0.05
    answers = read_json(run / "predictions-evaluation-rate-0.3.json")
    assert len(answers["predictions"]) == len(answers["labels"]) == 30
    assert shlex.split(export.text) == ["pyra", "export", str(run), "--rate", "0.3", "--format", "onnx"]
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(use.text, {})
    assert capsys.readouterr().out.strip() in (run / "labels.json").read_text(encoding="utf-8")
    assert main(["recommend", str(tmp_path / "sweep"), "--by", "macs", "--max-drop", "100"]) == 0
    assert "recommended  pyra" in capsys.readouterr().out
