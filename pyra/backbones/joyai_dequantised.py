"""Weights of quantised releases as floats: each is dequantised when it is read.

Formats: a block of ``weight`` times its entry of ``weight_scale_inv`` (DeepSeek-V3's ``inference/kernel.py``,
``weight_dequant``); compressed-tensors' ``weight`` times ``weight_scale``, and ``pack-quantized``, whose signed
integers are shifted to be positive and lie in 32-bit words of ``weight_packed``, the lowest bits first
(``pack_to_int32``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pyra.backbones.joyai_quantised import Storage


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the integers [R, ``columns``] of 32-bit words [R, W].

    >>> unpack(torch.tensor([[0x89]], dtype=torch.int32), 4, 3)
    tensor([[ 1,  0, -8]], dtype=torch.int32)
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)[..., :columns] - 2 ** (bits - 1)


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply values [R, C] by their scales, each for a block of rows and columns; the last ones may be cut off.

    >>> dequantise(torch.ones(2, 3), torch.tensor([[2.0, 4.0]]), (2, 2))
    tensor([[2., 2., 4.],
            [2., 2., 4.]])
    """
    rows, columns = values.shape
    spread = scale.float().reshape(-(-rows // block[0]), -(-columns // block[1]))
    spread = spread.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float() * spread


@dataclass(frozen=True)
class Dequantised:
    """A weight in float32 that is made when it is read, as a slice of a safetensors file is."""

    parts: Mapping[str, Any]
    shape: list[int]
    block: tuple[int, int]
    bits: int | None

    def __getitem__(self, index: Any) -> Tensor:
        scale = self.parts["scale"][...]
        if "packed" in self.parts:
            values = unpack(self.parts["packed"][...], self.bits or 4, self.shape[1])
        else:
            values = self.parts["weight"][...]
        return dequantise(values, scale, self.block)[index]


def open_weights(folder: Path, files: Mapping[str, str], storage: Storage) -> dict[str, Any]:
    """Return all weights by name; each is read where it is indexed, such as ``weights[name][...]``."""
    opened = {file: safe_open(folder / file, framework="pt") for file in sorted(set(files.values()))}
    weights: dict[str, Any] = {}
    for name, shape in storage.shapes.items():
        tensors = storage.parts.get(name, {"weight": name})
        slices = {part: opened[files[tensor]].get_slice(tensor) for part, tensor in tensors.items()}
        if name in storage.parts:
            bits = storage.scheme.bits if storage.scheme else None
            weights[name] = Dequantised(slices, shape, storage.blocks[name], bits)
        else:
            weights[name] = slices["weight"]
    return weights
