"""What every format has in common: arguments, missing libraries, what lies in the folder before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, ExportError
from pyra.export import FORMATS, ExportReport, export_model, load_exported

Images = Callable[[int], Tensor]
Export = tuple[Path, ExportReport]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unknown_format_is_told_with_its_neighbours(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown export format 'onx' \(did you mean 'onnx'.*\?\); there is hf, "):
        export_model(tiny, tmp_path / "new", "onx", example_input=images(1))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("format", "library", "extra"),
    [
        *(("onnx", library, "onnx") for library in ("onnx", "onnxruntime", "onnxscript")),
        ("onnx-int8", "onnxruntime", "onnx"),
        ("onnx-bf16", "openvino", "openvino"),
        ("torchao-int4", "torchao", "torchao"),
    ],
)
def test_a_missing_library_names_the_extra(
    format: str,
    library: str,
    extra: str,
    tiny: nn.Module,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in FORMATS[format].libraries:
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"the format {format} needs {library}: pip install 'pyra-adapt\[{extra}\]'"):
        export_model(tiny, tmp_path / "new", format, example_input=images(1))
    assert not (tmp_path / "new").exists()


def test_a_missing_runtime_is_left_out(
    exported: Export, no_exporter: list[nn.Module], wrapped: nn.Module, images: Images, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "openvino", None)
    report = export_model(wrapped, tmp_path, example_input=images(2))
    assert [comparison.runtime for comparison in report.comparisons] == ["onnxruntime"]
    with pytest.raises(ConfigError, match=r"opening onnx needs openvino: pip install 'pyra-adapt\[openvino\]'"):
        load_exported(tmp_path, runtime="openvino")


def test_the_runtime_that_is_installed_opens_it(
    exported: Export, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    expected = load_exported(exported[0])(images(2))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    opened = load_exported(exported[0])
    assert opened.runtime == "openvino"
    torch.testing.assert_close(opened(images(2)), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"opening onnx needs onnxruntime: pip install 'pyra-adapt\[onnx\]'"):
        load_exported(exported[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"example_input": [[1.0]]}, r"example_input must be a tensor \[B, 3, H, W\] with at least one image"),
        ({"example_input": torch.zeros(3, 16, 16)}, "example_input must be a tensor"),
        ({"example_input": torch.zeros(0, 3, 16, 16)}, "with at least one image"),
        ({"example_input": torch.full((1, 3, 16, 16), torch.nan)}, "example_input holds NaN or infinite values"),
        ({"calibration": torch.zeros(3, 16, 16)}, "calibration must be a tensor"),
        ({"calibration": torch.full((1, 3, 16, 16), torch.inf)}, "calibration holds NaN or infinite values"),
        ({"calibration": torch.zeros(1, 3, 8, 8)}, r"calibration is \[1, 3, 8, 8\], example_input \[2, 3, 16, 16\]"),
        ({"metadata": {"a": 3}}, "metadata is text under names; 3 is no text"),
        ({"metadata": {3: "a"}}, "metadata is text under names; 3 is no text"),
        ({"metadata": {"a": "half \ud800"}}, "is no text"),
        ({"metadata": ["a"]}, "metadata is text under names, a dict; got list"),
        ({"tolerance": -1}, "the tolerance must be a number of at least 0, got -1"),
        ({"tolerance": torch.nan}, "the tolerance must be a number of at least 0, got nan"),
        ({"tolerance": torch.inf}, "the tolerance must be a number of at least 0, got inf"),
    ],
)
def test_arguments_that_are_none(
    arguments: dict[str, Any], said: str, tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        export_model(tiny, tmp_path / "new", "hf", **{"example_input": images(2), **arguments})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 3, 16, 32)])
def test_images_that_the_model_does_not_take(shape: tuple[int, ...], tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the model cannot take inputs like example_input") as caught:
        export_model(tiny, tmp_path, "hf", example_input=torch.zeros(shape))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Returning(nn.Module):
    """A module that returns what it is given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, pixel_values: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(2, 3, 4), r"this model a tensor \[2, 3, 4\]: give it a classification head"),
        ((torch.zeros(2, 3),), "this model tuple: give it a classification head"),
        (None, "this model NoneType"),
        (SimpleNamespace(logits=None), "this model NoneType"),
        (torch.full((2, 3), torch.nan), "returns NaN or infinite logits"),
    ],
)
def test_a_model_that_returns_no_logits(output: Any, said: str, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        export_model(Returning(output), tmp_path, "torch-export", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_prompts_do_not_fold(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    tiny.peft_config = {"default": peft.PromptTuningConfig()}  # as PEFT's models of prompts have it, and no way to fold
    with pytest.raises(ExportError, match="no layers that fold into weights"):
        export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_stay_in_the_model_are_not_lost_in_silence(
    tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    from pyra.adapters import adapt
    from pyra.adapters.prompts import VisualPromptsConfig

    model = adapt(tiny, peft=VisualPromptsConfig())
    with pytest.raises(ExportError, match="visual_prompts has no place in the model"):
        export_model(model, tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_values(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="meta device"):
        export_model(tiny.to("meta"), tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.parametrize("earlier", [False, True])
def test_files_of_somebody_else_are_never_replaced(
    earlier: bool, name: str, exported: Export, tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    """Beside an export that did not write them, too."""
    if earlier:
        for path in exported[0].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=rf"holds {name}, which is of no finished export: choose another folder"):
        export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert contents(tmp_path) == before


def test_an_earlier_export_gives_way_and_other_files_stay(
    exported: Export, tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_text("mine")
    export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert sorted(contents(tmp_path)) == ["README.md", "config.json", "export.json", "model.safetensors", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine" and load_exported(tmp_path).format == "hf"


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_export_can_be_written_again(damage: str, tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    export_model(tiny, tmp_path, "hf", example_input=images(2))
    whole = contents(tmp_path)["model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    if damage == "missing":
        (tmp_path / "model.safetensors").unlink()
    export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert contents(tmp_path)["model.safetensors"] == whole and load_exported(tmp_path).format == "hf"


def test_a_record_that_names_other_files_removes_none(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    export_model(tiny, folder, "hf", example_input=images(2))
    (tmp_path / "outside.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    record = json.loads((folder / "export.json").read_text())
    record["files"] |= {"notes.txt": 4, "../outside.txt": 4}
    (folder / "export.json").write_text(json.dumps(record))
    export_model(tiny, folder, "hf", example_input=images(2))
    assert (folder / "notes.txt").read_text() == (tmp_path / "outside.txt").read_text() == "mine"


def test_no_mixture_of_two_exports_looks_finished(
    tiny: nn.Module, wrapped: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(tiny, tmp_path, "hf", example_input=images(2))
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_model(wrapped, tmp_path, "hf", example_input=images(2))
    monkeypatch.undo()
    with pytest.raises(ExportError, match="no finished export"):
        load_exported(tmp_path)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("place", ["a file", "below a file", "long name"])
def test_places_that_cannot_be_written(place: str, tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "long name": tmp_path / ("x" * 300),
    }[place]
    with pytest.raises(ExportError, match="choose another folder") as caught:
        export_model(tiny, folder, "hf", example_input=images(2))
    assert str(folder) in str(caught.value) and (tmp_path / "file").read_text() == "mine"


def test_the_home_folder_is_meant_by_its_sign(
    tiny: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export_model(tiny, "~/new", "hf", example_input=images(2))
    assert (tmp_path / "new" / "export.json").is_file() and load_exported("~/new").format == "hf"


def test_a_full_disk_leaves_nothing_and_says_so(
    tiny: nn.Module, images: Images, tmp_path: Path, tiny_disk: None
) -> None:
    with pytest.raises(OSError) as caught:
        export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert caught.value.filename is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"runtime": "onnxruntim"}, r"runtime 'onnxruntim' does not open onnx \(did you mean 'onnxruntime'\?\)"),
        ({"runtime": "pytorch"}, "runtime 'pytorch' does not open onnx.*; it opens in onnxruntime, openvino"),
        ({"runtime": ""}, "runtime '' does not open onnx"),
        ({"threads": 0}, "threads must be a positive whole number, got 0"),
        ({"threads": -1}, "threads must be a positive whole number, got -1"),
    ],
)
def test_how_an_export_cannot_be_opened(arguments: dict[str, Any], said: str, exported: Export) -> None:
    with pytest.raises(ConfigError, match=said):
        load_exported(exported[0], **arguments)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 3, 16, 8), (2, 1, 16, 16), (0, 3, 16, 16), ()])
def test_inputs_that_were_not_exported_for(shape: tuple[int, ...], exported: Export) -> None:
    with pytest.raises(ConfigError, match=r"takes pixel values \[B, 3, 16, 16\] with B >= 1, got \["):
        load_exported(exported[0])(torch.zeros(shape))


def test_an_array_is_no_tensor(exported: Export, images: Images) -> None:
    with pytest.raises(ConfigError, match="takes a tensor, got ndarray"):
        load_exported(exported[0])(images(1).numpy())  # type: ignore[arg-type]


def test_inputs_of_any_type_and_layout(exported: Export, images: Images) -> None:
    opened, pixels = load_exported(exported[0]), images(4)
    expected = opened(pixels)
    turned = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not turned.is_contiguous()
    for same in (turned, pixels.double(), pixels.clone().requires_grad_()):
        assert torch.equal(opened(same), expected) and not opened(same).requires_grad
    assert torch.equal(opened(pixels.bfloat16()), opened(pixels.bfloat16().float()))


def test_an_export_shows_what_it_is(exported: Export) -> None:
    assert repr(load_exported(exported[0])) == "Exported(format='onnx', runtime='onnxruntime')"


def test_an_adapter_of_several_layers_is_left_in_the_model(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny, peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_model(model, tmp_path, "hf", example_input=images(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
