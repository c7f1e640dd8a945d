"""Files that hold no plain tensors are refused; tests/backbones/test_loading.py has the ones that run code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyra.checkpoints import file_digest, read_state_dict, value_problems, writing
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


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_weights_that_find_no_room_are_named(write: object, tmp_path: Path, tiny_disk: None) -> None:
    file = tmp_path / "a.bin"
    with pytest.raises(OSError, match=r"too large|no space") as caught, writing(file):
        write({"a": torch.ones(100_000)}, file)  # type: ignore[operator]
    assert caught.value.filename == str(file)
    with pytest.raises(RuntimeError, match="mine"), writing(file):
        raise RuntimeError("mine")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown kind '\.h5'; use \.safetensors"):
        read_state_dict(tmp_path / "a.h5")


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 1}, torch.zeros(2)], ids=repr)
def test_no_state_dict(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"<html>404</html>", "neither an archive nor a pickle"),
        ("a.pth", b"", "not a readable .pth file"),
        ("a.bin", b"\x10\x00\x00\x00\x00\x00\x00\x00{}              ", "not a readable .bin file"),
        ("a.npz", b"PK\x03\x04", "not a readable .npz file"),
    ],
)
def test_other_files_are_refused_in_words(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights(dtype: torch.dtype) -> None:
    (problem,) = value_problems({"good": torch.ones(2, dtype=torch.float16), "bad": torch.ones(2).to(dtype)})
    assert problem.startswith("bad is ")
    assert value_problems({"bad": torch.tensor([1.0, float("inf")])}) == ["bad holds NaN or infinite values"]


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
