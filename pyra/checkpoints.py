"""Tensors from checkpoint files: nothing is unpickled, no code is run."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pyra.errors import CheckpointError

# What checkpoints are commonly nested under.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


_UNENDED = "it cannot be written to its end (no space left?)"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def value_problems(state: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that cannot be weights: whole numbers, 8-bit floats, NaN or infinite values."""
    problems = [
        f"{key} is {tensor.dtype}, not a float of 16 to 64 bits".replace("torch.", "")
        for key, tensor in state.items()
        if tensor.dtype not in _FLOATS
    ]
    return problems + [
        f"{key} holds NaN or infinite values"
        for key, tensor in state.items()
        if tensor.dtype in _FLOATS and not tensor.isfinite().all()
    ]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth``/``.pt``/``.bin`` (``weights_only``) or ``.npz`` file.

    Raises:
        CheckpointError: where the file is missing, unreadable, or would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        suffix = path.suffix.lower()
        if suffix == ".safetensors":
            return load_file(path)
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        if suffix not in (".pth", ".pt", ".bin"):
            raise CheckpointError(f"{path}: unknown kind {path.suffix!r}; use .safetensors, .npz, .pth, .pt or .bin")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            raise CheckpointError(
                f"{path}: cannot be read without running code from it; convert it to .safetensors where you trust it"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is neither an archive nor a pickle"
        raise CheckpointError(f"{path}: not a readable {path.suffix} file ({reason})") from None
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    odd = [f"{key} is {kind}" for key, value in loaded.items() if (kind := _unusable(value))]
    if odd:
        raise CheckpointError(f"{path}: {'; '.join(odd[:8])}; save plain dense tensors")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Let whatever a block writes weights with fail as files do: with an ``OSError`` that names ``path``.

    safetensors has an error class of its own for a full disk, and torch raises ``RuntimeError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # numpy says how much it could write, not why
            raise OSError(errno.ENOSPC, _UNENDED, str(path)) from None
        if error.filename is None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except RuntimeError as error:
        if not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        raise OSError(errno.ENOSPC, _UNENDED, str(path)) from None


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2)[:1] in (b"P", b"\x80")  # a zip archive (PK), or a pickle of protocol 2 and later


def _unusable(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "on the meta device (it has no values)"
    if tensor.layout != torch.strided:
        return "sparse"
    return "quantised" if tensor.is_quantized else None
