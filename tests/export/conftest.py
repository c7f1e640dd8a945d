"""Tiny models and inputs, and one real ONNX export of a model that merges: what goes wrong is tried on copies of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pyra import PyraConfig, wrap
from pyra.export import ExportReport, export_model

Images = Callable[[int], Tensor]
Export = tuple[Path, ExportReport]

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
METADATA = {"labels": '["a", "b"]', "note": "ü"}


def make_plain() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SIZE).eval()
    return model


def make_merging() -> nn.Module:
    model = wrap(make_plain(), PyraConfig(schedule=[4, 2]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def make_images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def tiny() -> nn.Module:
    """A timm model of 5 classes that does not merge, with the weights it starts with."""
    return make_plain()


@pytest.fixture
def wrapped() -> nn.Module:
    """A model that merges, the same one each time, with weights large enough to tell images apart."""
    return make_merging()


@pytest.fixture
def images() -> Images:
    """A function from a batch size to pixel values, other ones for each size."""
    return make_images


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The model that merges as ONNX; nobody writes to this folder."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="the extra `onnx` is not installed")
    folder = tmp_path_factory.mktemp("export") / "new"
    report = export_model(make_merging(), folder, example_input=make_images(3), metadata=METADATA)
    return folder, report


@pytest.fixture
def no_exporter(exported: Export, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Torch's exporter, which takes seconds, replaced by the graph that is there; holds the models it was asked for."""
    import onnx_ir

    asked: list[nn.Module] = []

    def graph(model: nn.Module, job: Any) -> Any:
        asked.append(model)
        return onnx_ir.load(exported[0] / "model.onnx")

    monkeypatch.setattr("pyra.export.onnx._graph", graph)
    return asked
