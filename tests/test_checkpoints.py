"""Files that hold no plain tensors are refused; tests/backbones/test_loading.py has the ones that run code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyra.checkpoints import read_state_dict
from pyra.errors import CheckpointError


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    ],
)
def test_tensors_without_plain_values(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a is .*{message}"):
        read_state_dict(tmp_path / "a.pth")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown kind '\.h5'; use \.safetensors"):
        read_state_dict(tmp_path / "a.h5")


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 1}, torch.zeros(2)], ids=repr)
def test_no_state_dict(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "a.pth")
