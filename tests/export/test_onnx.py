"""ONNX: one real export read back in every way; what goes wrong is tried on it without exporting again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import timm
import torch
from torch import Tensor, nn

from pyra import PyraConfig, wrap
from pyra.adapters import adapt
from pyra.errors import ConfigError, ExportError
from pyra.export import ExportReport, export_model, load_exported
from pyra.export.onnx import FILE, REPORT, _Session
from pyra.export.report import compare

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
import onnx

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
CONFIG = PyraConfig(schedule=[4, 2])


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZE).eval()


def wrapped() -> nn.Module:
    model = wrap(tiny(), CONFIG)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    folder = tmp_path_factory.mktemp("export") / "new"
    report = export_model(wrapped(), folder, example_input=images(3), metadata={"classes": '["a", "b"]', "note": "ü"})
    return folder, report


@pytest.fixture
def no_exporter(exported: tuple[Path, ExportReport], monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Torch's exporter replaced by the file that is there; holds the models it was asked to export."""
    asked: list[nn.Module] = []

    def export(model: nn.Module, *_: object, **__: object) -> SimpleNamespace:
        asked.append(model)
        return SimpleNamespace(model_proto=onnx.load(exported[0] / FILE))

    monkeypatch.setattr(torch.onnx, "export", export)
    return asked


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(exported: tuple[Path, ExportReport], batch: int) -> None:
    with torch.no_grad():
        expected = wrapped()(images(batch))
    actual = load_exported(exported[0])(images(batch))
    assert actual.shape == (batch, 5)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, expected.mean(), atol=1e-2)


def test_merging_is_in_the_graph(exported: tuple[Path, ExportReport]) -> None:
    kinds = {node.op_type for node in onnx.load(exported[0] / FILE).graph.node}
    assert kinds & {"TopK", "ArgMax"} and "Softmax" in kinds


def test_report_and_metadata(exported: tuple[Path, ExportReport]) -> None:
    folder, report = exported
    assert sorted(path.name for path in folder.iterdir()) == [REPORT, FILE]
    assert report.compared == 3 and report.top1_agreement == 1
    assert report.relative_difference < 1e-4 and report.max_logit > 0.1
    assert report.file == FILE
    assert report.megabytes == pytest.approx((folder / FILE).stat().st_size / 1e6)
    values = json.loads((folder / REPORT).read_text())
    assert values["format"] == "onnx" and values["max_difference"] == report.max_difference
    assert load_exported(folder).metadata == {"classes": '["a", "b"]', "note": "ü"}
    onnx.checker.check_model(str(folder / FILE))


def test_one_example_is_enough(no_exporter: list[nn.Module], tmp_path: Path) -> None:
    assert export_model(wrapped(), tmp_path, example_input=images(1)).compared == 1


@pytest.mark.parametrize("offset", [1.0, torch.nan, torch.inf])
def test_a_file_that_differs_is_not_left(
    offset: float, no_exporter: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _Session.__call__
    monkeypatch.setattr(_Session, "__call__", lambda self, pixels: run(self, pixels) + offset)
    with pytest.raises(ExportError, match=r"the exported model differs on .*more than the tolerance 0\.001 of it"):
        export_model(wrapped(), tmp_path / "new", example_input=images(2))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_tolerance_of_zero(no_exporter: list[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="more than the tolerance 0 of it"):
        export_model(wrapped(), tmp_path, example_input=images(4), tolerance=0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_one_before(
    exported: tuple[Path, ExportReport], no_exporter: list[nn.Module], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(exported[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExportError):
        export_model(tiny(), folder, example_input=images(2))  # another model than the one in the file
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_model_is_left_as_it_is(no_exporter: list[nn.Module], tmp_path: Path) -> None:
    model = wrapped().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    example = images(2).requires_grad_()
    export_model(model, tmp_path, example_input=example)
    assert model.training and model.blocks[0].training and no_exporter[0] is not model
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and example.grad is None


def test_peft_layers_are_folded_in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(tiny(), pyra=CONFIG, peft=peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    asked: list[nn.Module] = []

    class Stop(Exception):
        pass

    def export(model: nn.Module, *_: object, **__: object) -> None:
        asked.append(model)
        raise Stop

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(Stop):
        export_model(model, tmp_path, example_input=images(2))
    (folded,) = asked
    assert not any("lora" in name for name, _ in folded.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images(2)), wrap(tiny(), CONFIG)(images(2)), atol=1e-2)
    assert isinstance(model, peft.PeftModel) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="a second real export")
def test_adapted_model(tmp_path: Path) -> None:
    model = adapt(tiny(), pyra=CONFIG, peft=peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "reactivation" in name:
            nn.init.normal_(parameter)
    report = export_model(model, tmp_path, example_input=images(1))
    assert report.relative_difference < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(load_exported(tmp_path)(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model\.onnx there; give a folder written by export_model"):
        load_exported(tmp_path)
    with pytest.raises(ExportError, match=r"no model\.onnx there"):
        load_exported(tmp_path / "missing")


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_corrupt_file(damage: str, exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    content = (exported[0] / FILE).read_bytes()
    damaged = {"garbage": b"not an onnx file", "empty": b"", "truncated": content[: len(content) // 2]}[damage]
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(ExportError, match=r"model\.onnx: not a readable ONNX file"):
        load_exported(tmp_path)


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown export format 'onx' \(did you mean 'onnx'\?\); there is onnx"):
        export_model(tiny(), tmp_path, format="onx", example_input=images(1))


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_names_the_extra(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"needs {library}: pip install 'pyra-adapt\[onnx\]'"):
        export_model(tiny(), tmp_path, example_input=images(1))


def test_compare() -> None:
    expected = torch.tensor([[1.0, 2.0], [4.0, -8.0]])
    actual = torch.tensor([[1.0, 2.5], [-9.0, -8.0]])
    report = compare("f", 1.0, expected, actual, tolerance=2.0, merges=False)
    assert (report.max_difference, report.max_logit, report.top1_agreement, report.compared) == (13.0, 8.0, 0.5, 2)
    assert report.relative_difference == 13 / 8


def test_ties_are_told_from_a_wrong_export() -> None:
    expected = torch.randn(32, 5)
    few, many = expected.clone(), expected.clone()
    few[:3] += 0.5
    many[:4] += 0.5
    report = compare("a", 1.0, expected, few, tolerance=1e-3, merges=True)
    assert (report.differing, report.max_difference, report.compared) == (3, 0.0, 32)
    for actual, merges in ((many, True), (few, False), (expected * float("nan"), True)):
        with pytest.raises(ExportError, match=r"differs on (4|3|32) of 32 inputs"):
            compare("a", 1.0, expected, actual, tolerance=1e-3, merges=merges)
    with pytest.raises(ExportError, match="1 of 1"):
        compare("a", 1.0, expected[:1], few[:1], tolerance=1e-3, merges=True)
