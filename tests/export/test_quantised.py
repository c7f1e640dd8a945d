"""torchao's int8 and int4: what is read back is what was quantised, from integers and scales alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.errors import ConfigError, ExportError, UnsupportedModelError
from pyra.export import FORMATS, export_model, load_exported
from pyra.export.folding import folded_copy
from pyra.export.linear_training import fake_quantise_linear, trains_as_rounded
from pyra.export.quantised import _pack, _unpack, quantise

pytest.importorskip("torchao", reason="the extra `torchao` is not installed")

Images = Callable[[int], Tensor]
NAMES = ["torchao-int8", "torchao-int4"]
WEIGHTS = "model.safetensors"


def megabytes(folder: Path) -> float:
    return (folder / WEIGHTS).stat().st_size / 1e6


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the weights, None removes one; the record knows of it."""
    state = {**load_file(folder / WEIGHTS), **tensors}
    save_file({key: value for key, value in state.items() if value is not None}, folder / WEIGHTS)
    record = json.loads((folder / "export.json").read_text())
    record["files"][WEIGHTS] = (folder / WEIGHTS).stat().st_size
    record["sha256"] = {}
    (folder / "export.json").write_text(json.dumps(record))


@pytest.fixture(params=NAMES)
def quantised(request: pytest.FixtureRequest, wrapped: nn.Module, images: Images, tmp_path: Path) -> Path:
    export_model(wrapped, tmp_path / request.param, request.param, example_input=images(4))
    folder: Path = tmp_path / request.param
    return folder


def test_it_comes_back_as_it_was_quantised(quantised: Path, wrapped: nn.Module, images: Images) -> None:
    model = folded_copy(wrapped)
    quantise(model, quantised.name)
    opened = load_exported(quantised)
    with torch.no_grad():
        assert torch.equal(opened(images(6)), model(images(6)))
        error = (opened(images(6)) - wrapped(images(6))).abs().max() / wrapped(images(6)).abs().max()
    assert 0 < error <= FORMATS[quantised.name].tolerance


def test_what_was_trained_rounded_is_exported_as_it_worked(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    model = tiny
    plain, names = model(images(4)), list(model.state_dict())
    fake_quantise_linear(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(images(4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == names
    model.eval()
    with pytest.raises(ConfigError, match="trained as torchao-int4 rounds it: export it in that format, not as hf"):
        export_model(model, tmp_path / "hf", "hf", example_input=images(4))
    report = export_model(model, tmp_path / "int4", "torchao-int4", example_input=images(4))
    assert report.comparison.relative_difference <= 1e-5
    with torch.no_grad():
        expected = model(images(6))
        assert torch.allclose(load_exported(tmp_path / "int4")(images(6)), expected, atol=1e-5)
        assert (plain - model(images(4))).abs().max() > 1e-2


def test_layers_that_are_left_stay_float() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(5, 3)).eval()
    inputs = torch.randn(7, 64)
    fake_quantise_linear(model, leave=[model[1]])
    assert [trains_as_rounded(part) for part in model] == [True, False, False]
    expected = model(inputs)
    head = model[1].weight
    quantise(model, "torchao-int4")
    assert torch.equal(model(inputs), expected) and model[1].weight is head
    with pytest.raises(UnsupportedModelError, match="no linear layers of a multiple of 32 inputs"):
        fake_quantise_linear(nn.Sequential(nn.Linear(20, 4)))


def test_weights_of_float64_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)).double()
    with pytest.raises(ConfigError, match=r"not weights of float64: model\.float\(\) first"):
        fake_quantise_linear(model)
    assert not trains_as_rounded(model)


def test_torchao_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install 'pyra-adapt\[torchao\]'"):
        fake_quantise_linear(nn.Linear(32, 4))


def test_fewer_bits_are_fewer_bytes(wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    for name in ("hf", *NAMES):
        export_model(wrapped, tmp_path / name, name, example_input=images(2))
    whole, eight, four = (megabytes(tmp_path / name) for name in ("hf", *NAMES))
    assert four < eight < whole


def test_the_file_holds_integers_and_scales(quantised: Path) -> None:
    types = {value.dtype for key, value in load_file(quantised / WEIGHTS).items() if "qdata" in key}
    assert types == {torch.uint8 if quantised.name == "torchao-int4" else torch.int8}


def test_packing_two_values_a_byte() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3).reshape(4, 12)
    packed = _pack(values)
    assert packed.numel() == 24 and packed.dtype == torch.uint8
    unpacked = _unpack(packed, values.shape)
    assert unpacked is not None and torch.equal(unpacked, values) and unpacked.dtype == torch.int8
    every = torch.arange(256, dtype=torch.uint8)
    both = _unpack(every, torch.Size([512]))
    assert both is not None and torch.equal(_pack(both), every)
    for wrong in (packed[:-1], packed.int(), packed.reshape(2, 12)):
        assert _unpack(wrong, values.shape) is None


def test_parts_that_do_not_fit_are_named(quantised: Path) -> None:
    state = load_file(quantised / WEIGHTS)
    integers = [key for key in state if "qdata" in key]
    scale = next(key for key in state if key.endswith(".scale"))
    changes: dict[str, Any] = {
        integers[0]: None,
        integers[1]: state[integers[1]][:-1].clone(),
        "stranger": torch.zeros(2),
    }
    changes[scale] = torch.full_like(state[scale], torch.inf)
    changes[integers[2]] = state[integers[2]].to(torch.int32)
    change(quantised, **changes)
    with pytest.raises(ExportError) as caught:
        load_exported(quantised)
    said = str(caught.value)
    assert f"{integers[0]} is not in the file" in said and "stranger has no place in the model" in said
    assert f"{integers[1]} is" in said and f"{scale} holds NaN or infinite values" in said
    assert f"{integers[2]} is torch.int32" in said and "\n" not in said


@pytest.mark.parametrize(
    "text", ["", "[]", '["architecture"]', '["model_type"]', "3", "[" * 100_000, '{"a": NaN}', "{}"]
)
def test_a_configuration_that_is_none(text: str, quantised: Path) -> None:
    (quantised / "config.json").write_text(text)
    record = json.loads((quantised / "export.json").read_text())
    record["files"]["config.json"] = len(text)
    record["sha256"] = {}
    (quantised / "export.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match=r"config\.json") as caught:
        load_exported(quantised)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_of_weights(quantised: Path) -> None:
    whole = (quantised / WEIGHTS).read_bytes()
    (quantised / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=rf"{WEIGHTS} has {len(whole) // 2} bytes, export.json says {len(whole)}"):
        load_exported(quantised)
    record = json.loads((quantised / "export.json").read_text())
    record["files"][WEIGHTS] = len(whole) // 2
    record["sha256"] = {}
    (quantised / "export.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match="not a readable SAFETENSORS file"):
        load_exported(quantised)


def test_a_model_without_linear_layers_that_fit(images: Images, tmp_path: Path) -> None:
    import timm

    small = {"img_size": 16, "patch_size": 4, "embed_dim": 20, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **small, mlp_ratio=2).eval()
    for name in NAMES:
        with pytest.raises(ExportError, match="no linear layers of a multiple of 32 inputs to quantise"):
            export_model(model, tmp_path, name, example_input=images(2))
        assert list(tmp_path.iterdir()) == []
