"""A run exported: what is measured of it, what is overwritten, and what ``pyra export`` says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pyra.errors import ConfigError, OutputError
from pyra.export import FORMATS, load_exported
from pyra.scripts.main import main
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.exporting import MEASURED, PYTORCH, check_formats, export_run, subject_of
from pyra.tasks.options import RunOptions
from pyra.tasks.output import CLAIM_FILE
from pyra.tasks.training import train

HF = {CLAIM_FILE, "README.md", "config.json", "export.json", MEASURED, "model.safetensors"}


def options(backbone: Path, output: Path, **changes: Any) -> RunOptions:
    settings = {"method": "pyra", "rate": "0.3", "epochs": 1, "limit": 24, "batch_size": 8, **changes}
    return RunOptions(backbone=str(backbone), output=str(output), device="cpu", **settings)


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few images; nobody writes to this folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(options(tiny_backbone, folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measured(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MEASURED).read_text())
    return values


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line that was said, which is an error."""
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("pyra: error: ") and shown.err.count("\n") == 1, shown
    return shown.err


def test_a_run_becomes_a_folder_that_says_what_it_is(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "out", format="hf", images=4)
    assert names(tmp_path / "out") == HF
    assert json.loads((tmp_path / "out" / CLAIM_FILE).read_text())["kind"] == "export"
    opened = load_exported(tmp_path / "out")
    assert json.loads(opened.metadata["labels"]) == json.loads((run / "labels.json").read_text())
    assert (opened.metadata["image_size"], opened.metadata["task"]) == ("32", "demo")
    assert len(opened.metadata["mean"].split()) == len(opened.metadata["std"].split()) == 3
    assert done.report.comparison.real == 4 and any(opened.record.schedule or [])
    subject = subject_of(run, images=4)
    with torch.no_grad():
        assert torch.equal(opened(subject.batch), subject.model(subject.batch))


def test_a_format_that_rounds_nothing_is_timed_and_not_scored(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "out", format="hf", images=4)
    values = measured(tmp_path / "out")
    assert values["batch_size"] == 4 and set(values["images_per_second"]) == {PYTORCH, "pytorch"}
    assert all(speed > 0 for speed in values["images_per_second"].values())
    assert [values[name] for name in ("metric", "value", "plain_value", "scored")] == [None] * 4
    assert values["images_per_second"] == done.measured.images_per_second


def test_the_accuracy_of_a_format_that_rounds_is_that_of_its_logits(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    export_run(run, tmp_path / "out", format="torchao-int4", images=4)
    values, subject = measured(tmp_path / "out"), subject_of(run)
    pixels = torch.stack([subject.test[index]["pixel_values"] for index in range(len(subject.test))])
    labels = torch.tensor([subject.test[index]["labels"] for index in range(len(subject.test))])
    assert (values["metric"], values["scored"]) == (subject.metric, len(labels)) and subject.metric == "accuracy"
    with torch.no_grad():
        for name, model in (("value", load_exported(tmp_path / "out")), ("plain_value", subject.model)):
            hits = (torch.as_tensor(model(pixels)).argmax(-1) == labels).double().mean()
            assert values[name] == pytest.approx(float(hits))
    assert values["plain_value"] == pytest.approx(json.loads((run / "result.json").read_text())["value"])


def test_calibration_takes_training_images(run: Path) -> None:
    subject = subject_of(run, images=3)
    assert len(subject.batch) == 3 and len(subject.calibration) == 64
    assert not any(torch.equal(image, other) for image in subject.batch for other in subject.calibration)


@pytest.mark.filterwarnings("ignore:rate 0.20 is outside")
def test_an_export_is_replaced_only_on_request(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_run(run, folder, format="hf", images=2)
    before = contents(folder)
    with pytest.raises(OutputError, match="already holds an export: pass --overwrite"):
        export_run(run, folder, format="hf", images=2, rate=0.2)
    assert contents(folder) == before
    export_run(run, folder, format="hf", images=2, rate=0.2, overwrite=True)
    assert names(folder) == HF and contents(folder)["config.json"] != before["config.json"]


def test_a_failed_export_keeps_the_one_before_and_leaves_no_new_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "hf"
    export_run(run, folder, format="hf", images=2)
    before = contents(folder)
    monkeypatch.setattr("pyra.export.exporting._run", lambda *_: torch.zeros(10, 10))
    for output in ("out", "new"):
        line = [
            "export",
            str(run),
            "--format",
            "hf",
            "--images",
            "2",
            "--overwrite",
            "--output",
            str(tmp_path / output),
        ]
        assert main(line) == 2
        assert "differs on" in one_line(capsys)
    assert contents(folder) == before and not (tmp_path / "new" / "hf").exists()


def test_files_of_somebody_else_are_refused_even_with_overwrite(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds files that are not from pyra \(model\.onnx\)"):
            export_run(run, tmp_path / "out", format="hf", overwrite=overwrite, images=2)
    assert contents(tmp_path / "out") == {"model.onnx": b"mine"}


@pytest.mark.parametrize("images", [0, -3])
def test_a_number_of_images_that_is_none(images: int, run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--images must be a positive number, got {images}"):
        subject_of(run, images=images)


def test_the_command_writes_a_folder_a_format_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "hf,torch-export", "--images", "2"]) == 0
    shown = capsys.readouterr().out
    assert names(run / "export") == {"hf", "torch-export"} and names(run / "export" / "hf") == HF
    assert shown.count("as the model") == 2 and "images/s at batch 2; the model in PyTorch: " in shown
    assert f"next: pyra predict {run / 'export' / 'hf'} IMAGE" in shown
    for format in ("hf", "torch-export"):
        assert load_exported(run / "export" / format).format == format
    before = contents(run)
    assert main(["export", str(run), "--format", "hf", "--images", "2"]) == 2
    assert f"{run / 'export' / 'hf'} already holds an export: pass --overwrite" in one_line(capsys)
    assert contents(run) == before


@pytest.mark.filterwarnings("ignore:rate 0.00 is outside")
def test_the_command_writes_an_export_a_rate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(run), "--format", "hf", "--output", str(tmp_path / "out"), "--images", "2"]
    assert main([*command, "--rate", "0,0.3"]) == 0
    assert names(tmp_path / "out") == {"hf-0", "hf-0.3"}
    rates = [load_exported(tmp_path / "out" / name).record.rate for name in ("hf-0", "hf-0.3")]
    assert rates[0] == 0 and rates[1] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "onx"], "unknown --format 'onx' (did you mean 'onnx'"),
        (["--format", "hf,hff"], "unknown --format 'hff' (did you mean 'hf'?); there is hf, torch-export, aoti"),
        (["--format", "hf,hf"], "--format names something twice: hf, hf"),
        (["--format", "hf", "--rate", "0.3,0.3"], "--rate names something twice: 0.3, 0.3"),
        (["--format", "hf", "--rate", "1.5"], "1.5"),
        (["--format", "hf", "--rate", "-0.1"], "-0.1"),
        (["--format", "hf", "--rate", "nan"], "nan"),
        (["--format", "hf", "--rate", "much"], "much"),
        (["--format", "hf", "--images", "0"], "--images must be a positive number, got 0"),
        (["--format", "hf", "--tolerance", "-1"], "tolerance must be a number of at least 0"),
        (["--format", "hf", "--tolerance", "nan"], "tolerance"),
        (["--format", ""], "--format"),
        (["--formt", "hf"], "--formt"),
    ],
)
def test_what_the_command_refuses_in_one_line(
    arguments: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main(["export", str(run), *arguments]) == 2
    assert said in one_line(capsys)
    assert contents(run) == before


def test_an_export_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_run(run, tmp_path / "a", format="hf")
    assert main(["export", str(tmp_path / "a"), "--format", "hf"]) == 2
    assert "is an export, not a run: name the folder of the run" in one_line(capsys)


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["export"], ["export", str(tmp_path)], ["export", str(tmp_path / "missing"), "--format", "hf"]):
        assert main(line) == 2
        one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_several_problems_are_found_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=f"--format is empty: give one or more of {', '.join(FORMATS)}"):
        check_formats([], None)
    with pytest.raises(ConfigError, match="--rate names something twice"):
        check_formats(["hf"], [0.5, 0.3, 0.5])
    check_formats(["hf", "torch-export"], [0.5, 0.3])


def test_a_rate_of_a_run_that_merges_nothing(tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "run", method="lora", rate=None))
    with pytest.raises(ConfigError, match="merges nothing"):
        export_run(tmp_path / "run", tmp_path / "out", format="hf", rate=0.3)
    export_run(tmp_path / "run", tmp_path / "out", format="hf", images=2)
    assert load_exported(tmp_path / "out").record.schedule is None


def test_a_run_trained_again_replaces_its_exports_but_nothing_of_others(
    tiny_backbone: Path, run: Path, tmp_path: Path
) -> None:
    export_run(run, run / "export" / "hf", format="hf", images=2)
    (run / "export" / "hf" / "notes.txt").write_text("mine")
    before = contents(run)
    with pytest.raises(OutputError, match=r"export holds files that are not from pyra \(hf/notes\.txt\)"):
        train(options(tiny_backbone, run, overwrite=True))
    assert contents(run) == before
    (run / "export" / "hf" / "notes.txt").unlink()
    train(options(tiny_backbone, run, overwrite=True))
    assert (run / "result.json").is_file() and not (run / "export").exists()


@pytest.mark.parametrize("method", ["full", "pyra"])
def test_a_run_that_was_trained_rounded_is_exported_as_it_was_scored(
    method: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    how = {"rate": None} if method == "full" else {"dropout": 0.0, "lr": 0.02, "targets": "qkv,fc1"}
    result = train(options(tiny_backbone, tmp_path / "run", method=method, qat="int4", **how))
    assert result.method == f"{method}+int4"
    assert evaluate_run(tmp_path / "run", device="cpu").value == result.value
    export_run(tmp_path / "run", tmp_path / "out", format="torchao-int4", images=4)
    values = measured(tmp_path / "out")
    assert values["value"] == values["plain_value"] == pytest.approx(result.value)
    opened, subject = load_exported(tmp_path / "out"), subject_of(tmp_path / "run", images=4)
    with torch.no_grad():
        assert torch.allclose(opened(subject.batch), subject.model(subject.batch), atol=1e-5)
    with pytest.raises(ConfigError, match="export it in that format, not as onnx"):
        export_run(tmp_path / "run", tmp_path / "onnx", images=4)


def test_what_cannot_be_trained_rounded_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--qat int4 takes no dropout in the adapter, .* add --dropout 0, not 0.1"):
        options(tiny_backbone, tmp_path / "other", qat="int4")
    with pytest.raises(ConfigError, match=r"--qat int4 goes with --method full, lora and rslora, .* what dora adds"):
        options(tiny_backbone, tmp_path / "other", qat="int4", peft="dora", dropout=0.0)
    with pytest.raises(ConfigError, match="what bottleneck adds"):
        options(tiny_backbone, tmp_path / "other", method="adapter", rate=None, qat="int4", dropout=0.0)
