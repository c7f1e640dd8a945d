"""Weights for engines: a matrix an expert, in shards that are cast and written one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyra.backbones.joyai_folder import INDEX, MTP, SINGLE
from pyra.backbones.joyai_mtp_weights import without_mtp
from pyra.checkpoints import writing
from pyra.errors import ExportError, UnsupportedModelError
from pyra.experts.quantising import QuantisingConfig, quantise
from pyra.export.engine_config import family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.export.int4 import pack
from pyra.files import write_json

SHARD = 5_000_000_000
"""Bytes of a file of weights at most, where no single tensor is larger."""

_STACKED, _DOWN, _BIAS = ".experts.gate_up_proj", ".experts.down_proj", ".e_score_correction_bias"


@dataclass(frozen=True)
class Stored:
    """A tensor as it is written: a view of a parameter, which is cast or rounded when its shard is.

    Attributes:
        name: in the checkpoint.
        value: the view.
        dtype: it is written in.
        rounding: how it is rounded to integers; None for floats.
    """

    name: str
    value: Tensor
    dtype: torch.dtype
    rounding: QuantisingConfig | None = None

    @property
    def size(self) -> int:
        """Bytes in the file; of integers about."""
        if self.rounding is None:
            return self.value.numel() * self.dtype.itemsize
        return self.value.numel() * self.rounding.bits // 8 + self.value.numel() // self.rounding.group_size * 4

    def parts(self) -> dict[str, Tensor]:
        """Return tensors of their own, on the CPU; raises :class:`ExportError` for numbers that they cannot hold."""
        own = self.value.detach().cpu()
        cast = own.to(self.dtype, copy=True).contiguous()
        if not cast.isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            raise ExportError(f"{self.name} has numbers that {kind} cannot hold: write engine-bf16 or engine-fp32")
        if self.rounding is None:
            return {self.name: cast}
        values, scale = quantise(own, self.rounding)
        shape = torch.tensor(own.shape)
        return {f"{self.name}_packed": pack(values), f"{self.name}_scale": scale, f"{self.name}_shape": shape}


def stored_tensors(model: nn.Module, dtype: torch.dtype, rounding: QuantisingConfig | None = None) -> list[Stored]:
    """Return a model's tensors by the names of checkpoints: experts apart, a shared embedding once.

    Correction biases of routers stay in float32: they are added to scores, and choose experts.

    Args:
        model: folded, nothing merging.
        dtype: of what stays float.
        rounding: of routed experts; None for floats.

    Raises:
        UnsupportedModelError: for stacked weights that are no experts of DeepSeek-V3's kind.
    """
    tied = family_of(model) != DEEPSEEK and bool(model.config.tie_word_embeddings)  # type: ignore[union-attr]
    found = []
    for name, value in without_mtp(model.state_dict()).items():
        if tied and name == "lm_head.weight":
            continue
        kind = torch.float32 if name.endswith(_BIAS) else dtype
        how = rounding if name.endswith((_STACKED, _DOWN)) else None
        found += [Stored(own, part, kind, how) for own, part in _apart(name, value)]
    return found


def _apart(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices that a stack of experts is made of, gate before up; another tensor as it is."""
    if name.endswith(_STACKED):
        stem, half = name.removesuffix("gate_up_proj"), value.shape[1] // 2
        for index, both in enumerate(value):
            yield f"{stem}{index}.gate_proj.weight", both[:half]
            yield f"{stem}{index}.up_proj.weight", both[half:]
    elif name.endswith(_DOWN):
        stem = name.removesuffix("down_proj")
        for index, matrix in enumerate(value):
            yield f"{stem}{index}.down_proj.weight", matrix
    elif value.ndim > 2:
        raise UnsupportedModelError(f"{name} is {list(value.shape)}: stacked weights that engines have no name for")
    else:
        yield name, value


def write_weights(stored: Iterable[Stored], folder: Path, mtp: Mapping[str, Tensor], shard: int = SHARD) -> None:
    """Write shards and their index, or one file without; those of MTP layers in a shard of their own.

    Args:
        stored: of :func:`stored_tensors`.
        folder: to write to.
        mtp: weights of MTP layers, as they are written.
        shard: bytes of a file at most.
    """
    shards = list(_sharded(stored, shard))
    single = len(shards) == 1 and not mtp
    index: dict[str, str] = {}
    size = sum(value.nbytes for value in mtp.values())
    for number, own in enumerate(shards, 1):
        file = SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: part for one in own for name, part in one.parts().items()}
        _save(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
        size += sum(part.nbytes for part in tensors.values())
    if mtp:
        _save(dict(mtp), folder / MTP)
        index |= dict.fromkeys(mtp, MTP)
    if not single:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with writing(path):
        save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _sharded(stored: Iterable[Stored], most: int) -> Iterator[list[Stored]]:
    part: list[Stored] = []
    size = 0
    for one in stored:
        if part and size + one.size > most:
            yield part
            part, size = [], 0
        part.append(one)
        size += one.size
    if part:
        yield part
