"""ONNX: one real export read back in every way; what goes wrong is tried on it without exporting again."""

from __future__ import annotations

import copy
import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyra import PyraConfig, wrap
from pyra.adapters import adapt
from pyra.errors import ExportError
from pyra.export import FORMATS, ExportReport, export_model, load_exported
from pyra.export.formats import installed_runtimes
from pyra.export.record import RECORD

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

Images = Callable[[int], Tensor]
Export = tuple[Path, ExportReport]

FILE = "model.onnx"
HALVES = ["onnx-fp16", "onnx-bf16"]
INT8 = ["onnx-int8", "onnx-int8-dynamic", "onnx-int8-weights"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(exported: Export, batch: int, runtime: str, wrapped: nn.Module, images: Images) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    with torch.no_grad():
        expected = wrapped(images(batch))
    opened = load_exported(exported[0], runtime=runtime)
    actual = opened(images(batch))
    assert opened.runtime == runtime and actual.shape == (batch, 5) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, expected.mean(), atol=1e-2)


def test_merging_is_in_the_graph_and_nothing_that_other_engines_lack(exported: Export) -> None:
    graph = onnx.load(exported[0] / FILE).graph
    kinds = {node.op_type for node in graph.node}
    assert kinds & {"TopK", "ArgMax"} and "Softmax" in kinds
    assert [kind for kind in kinds if kind.startswith("Scatter") or kind in ("If", "Loop", "Scan")] == []
    assert {node.domain for node in graph.node} == {""}
    assert exported[1].operators == {kind: sum(n.op_type == kind for n in graph.node) for kind in kinds}


def test_only_the_batch_size_is_free(exported: Export) -> None:
    graph = onnx.load(exported[0] / FILE).graph
    (taken,), (given,) = graph.input, graph.output
    sides = [
        [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim] for value in (taken, given)
    ]
    assert (taken.name, given.name) == ("pixel_values", "logits")
    assert sides == [["batch", 3, 16, 16], ["batch", 5]]


def test_report_record_and_metadata(exported: Export) -> None:
    folder, report = exported
    assert sorted(contents(folder)) == [RECORD, FILE]
    assert [comparison.runtime for comparison in report.comparisons] == installed_runtimes(FORMATS["onnx"])
    for comparison in report.comparisons:
        assert (comparison.real, comparison.compared, comparison.differing, comparison.top1_agreement) == (3, 11, 0, 1)
        assert comparison.relative_difference < 1e-4 and comparison.max_logit > 0.1
    assert (report.format, report.file) == ("onnx", FILE)
    assert report.megabytes == (folder / FILE).stat().st_size / 1e6
    values = json.loads((folder / RECORD).read_text())
    assert values["files"] == {FILE: (folder / FILE).stat().st_size}
    assert (values["format"], values["input_shape"], values["classes"]) == ("onnx", [3, 16, 16], 5)
    assert values["schedule"] == [4, 2] and 0 < values["rate"] < 1
    assert values["comparisons"][0]["max_difference"] == report.comparison.max_difference
    assert load_exported(folder).metadata == {"labels": '["a", "b"]', "note": "ü"}


def test_the_file_holds_the_metadata_too(exported: Export) -> None:
    stored = {entry.key: entry.value for entry in onnx.load(exported[0] / FILE).metadata_props}
    assert stored["labels"] == '["a", "b"]' and stored["note"] == "ü"


def test_the_checker_accepts_the_file(exported: Export) -> None:
    onnx.checker.check_model(str(exported[0] / FILE), full_check=True)


def test_the_streamed_file_is_one_that_onnx_reads_and_writes_again(exported: Export, tmp_path: Path) -> None:
    model = onnx.load(exported[0] / FILE)
    onnx.save(model, str(tmp_path / "again.onnx"))
    assert onnx.load(tmp_path / "again.onnx") == model
    assert (tmp_path / "again.onnx").stat().st_size == (exported[0] / FILE).stat().st_size


def test_every_weight_is_in_the_file_with_its_bits(exported: Export, wrapped: nn.Module) -> None:
    arrays = [
        torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(exported[0] / FILE).graph.initializer
    ]
    streamed = [array for array in arrays if array.nbytes >= 4096]
    matrices = {name: value for name, value in wrapped.state_dict().items() if value.nbytes >= 4096}
    assert len(matrices) > 5 and len(streamed) >= len(matrices)
    for name, value in matrices.items():
        assert any(torch.equal(value, a) or (a.ndim == 2 and torch.equal(value, a.T)) for a in streamed), name


@pytest.mark.parametrize("name", ["stdlib", "purelib", "cwd", "home"])
def test_no_path_of_this_machine_is_in_the_file(name: str, exported: Export) -> None:
    place = {"cwd": str(Path.cwd()), "home": str(Path.home())}.get(name) or sysconfig.get_path(name)
    assert place.encode() not in (exported[0] / FILE).read_bytes()


def test_one_example_is_enough(
    no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path
) -> None:
    found = export_model(wrapped, tmp_path, example_input=images(1)).comparison
    assert (found.real, found.compared) == (1, 9)


@pytest.mark.parametrize("offset", [1.0, torch.nan, torch.inf])
def test_a_file_that_differs_is_not_left(
    offset: float,
    no_exporter: list[nn.Module],
    wrapped: nn.Module,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pyra.export import onnx as module

    opener = module._in_onnxruntime

    def shifted(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
        run = opener(path, threads)
        return lambda pixel_values: run(pixel_values) + offset

    monkeypatch.setattr(module, "_in_onnxruntime", shifted)
    with pytest.raises(ExportError, match=r"in onnxruntime differs on .*more than the tolerance 0\.001 of it"):
        export_model(wrapped, tmp_path / "new", example_input=images(2))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_runtime_that_differs_is_not_made_good_by_another(
    no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr("pyra.export.onnx._in_openvino", lambda *_: lambda pixels: torch.zeros(len(pixels), 5))
    with pytest.raises(ExportError, match="in openvino differs on"):
        export_model(wrapped, tmp_path, example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_a_tolerance_of_zero(no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="more than the tolerance 0 of it"):
        export_model(wrapped, tmp_path, example_input=images(4), tolerance=0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_one_before(
    exported: Export, no_exporter: list[nn.Module], tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(exported[0], folder)
    before = contents(folder)
    with pytest.raises(ExportError, match="differs on"):
        export_model(tiny, folder, example_input=images(2))  # another model than the one in the file
    assert contents(folder) == before


def test_the_model_is_left_as_it_is(
    no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path
) -> None:
    model = wrapped.train()
    state = copy.deepcopy(model.state_dict())
    example = images(2).requires_grad_()
    export_model(model, tmp_path, example_input=example)
    assert model.training and model.blocks[0].training and no_exporter[0] is not model
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and example.grad is None


def adapted(model: nn.Module) -> Any:
    model = adapt(model, pyra=PyraConfig(schedule=[4, 2]), peft=peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "reactivation" in name:
            nn.init.normal_(parameter)
    return model


def test_peft_layers_are_folded_in_a_copy(
    tiny: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = wrap(copy.deepcopy(tiny), PyraConfig(schedule=[4, 2]))
    model = adapted(tiny)
    state = copy.deepcopy(model.state_dict())
    asked: list[nn.Module] = []

    class Stop(Exception):
        pass

    def graph(model: nn.Module, job: Any) -> None:
        asked.append(model)
        raise Stop

    monkeypatch.setattr("pyra.export.onnx._graph", graph)
    with pytest.raises(Stop):
        export_model(model, tmp_path, example_input=images(2))
    (folded,) = asked
    assert not any("lora" in name for name, _ in folded.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images(2)), plain(images(2)), atol=1e-2)
    assert isinstance(model, peft.PeftModel) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="a second real export")
def test_adapted_model(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    model = adapted(tiny)
    report = export_model(model, tmp_path, example_input=images(1))
    assert report.comparison.relative_difference < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(load_exported(tmp_path)(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_a_file_that_no_runtime_reads(damage: str, exported: Export, tmp_path: Path) -> None:
    whole = (exported[0] / FILE).read_bytes()
    damaged = {"garbage": b"not an onnx file", "empty": b"", "truncated": whole[: len(whole) // 2]}[damage]
    record = json.loads((exported[0] / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "files": {FILE: len(damaged)}, "sha256": {}}))
    (tmp_path / FILE).write_bytes(damaged)
    for runtime in installed_runtimes(FORMATS["onnx"]):
        with pytest.raises(ExportError, match=r"model\.onnx: not a readable ONNX file") as caught:
            load_exported(tmp_path, runtime=runtime)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", INT8)
def test_int8(
    format: str, exported: Export, no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path
) -> None:
    report = export_model(wrapped, tmp_path, format, example_input=images(16))
    assert sorted(contents(tmp_path)) == [RECORD, FILE]
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / FILE).graph.initializer}
    assert kinds & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert report.megabytes < exported[1].megabytes
    with torch.no_grad():
        expected = wrapped(images(16))
    for comparison in report.comparisons:
        assert (comparison.compared, comparison.real) == (16, 16)
        error = (load_exported(tmp_path, runtime=comparison.runtime)(images(16)) - expected).abs().amax(-1)
        assert error.max() > 0, "nothing was rounded"
        assert (error <= FORMATS[format].tolerance * expected.abs().max()).sum() >= 16 - comparison.differing


@pytest.mark.slow  # two quantised exports
def test_ranges_come_from_the_calibration_images(
    no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path
) -> None:
    def scales(folder: Path, calibration: Tensor | None) -> list[float]:
        told = {"example_input": images(4), "calibration": calibration, "tolerance": 1e3}
        export_model(wrapped, folder, "onnx-int8", **told)
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / FILE).graph.initializer}
        return [float(value) for name, value in sorted(arrays.items()) if name.endswith("_scale") and value.ndim == 0]

    own, wide = scales(tmp_path / "own", None), scales(tmp_path / "wide", 50 * images(4))
    assert len(own) == len(wide) > 3
    assert own == scales(tmp_path / "given", images(4)) and own != wide


def test_a_model_without_products_to_quantise(
    tmp_path: Path, images: Images, no_exporter: list[nn.Module], monkeypatch: pytest.MonkeyPatch, wrapped: nn.Module
) -> None:
    monkeypatch.setattr("pyra.export.onnx_int8.products_with_weights", lambda path: [])
    with pytest.raises(ExportError, match="no products with weights to quantise"):
        export_model(wrapped, tmp_path, "onnx-int8", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="a real export each")
@pytest.mark.parametrize("format", HALVES)
def test_half_precision(format: str, exported: Export, wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    if format == "onnx-bf16":
        pytest.importorskip("openvino", reason="openvino is not installed")
    report = export_model(wrapped, tmp_path, format, example_input=images(16))
    weights = [t for t in onnx.load(tmp_path / FILE).graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]
    half = {"onnx-fp16": onnx.TensorProto.FLOAT16, "onnx-bf16": onnx.TensorProto.BFLOAT16}[format]
    assert weights and {tensor.data_type for tensor in weights} == {half}
    assert report.megabytes < exported[1].megabytes
    with torch.no_grad():
        expected = wrapped(images(16))
    for comparison in report.comparisons:
        assert comparison.max_difference > 0
        actual = load_exported(tmp_path, runtime=comparison.runtime)(images(16))
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
        error = (actual - expected).abs().amax(-1)
        assert (error <= FORMATS[format].tolerance * expected.abs().max()).sum() >= 16 - comparison.differing


def test_more_than_a_message_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from pyra.export.onnx_file import write_streamed

    weight = SimpleNamespace(const_value=SimpleNamespace(nbytes=2**31))
    with pytest.raises(ExportError, match="at most 2 GB of weights"):
        write_streamed(SimpleNamespace(graph=SimpleNamespace(initializers={"w": weight})), tmp_path / FILE, {})
    assert list(tmp_path.iterdir()) == []
