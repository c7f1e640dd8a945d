"""Weights for engines: a matrix an expert, in shards that are cast and written one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyra.backbones.joyai_folder import INDEX, MTP, SINGLE
from pyra.checkpoints import writing
from pyra.errors import ExportError, UnsupportedModelError
from pyra.export.engine_config import family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.files import write_json

SHARD = 5_000_000_000
"""Bytes of a file of weights at most, where no single tensor is larger."""

_STACKED, _DOWN, _BIAS = ".experts.gate_up_proj", ".experts.down_proj", ".e_score_correction_bias"


@dataclass(frozen=True)
class Stored:
    """A tensor as it is written: a view of a parameter, which is cast when its shard is."""

    name: str
    value: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.value.numel() * self.dtype.itemsize

    def cast(self) -> Tensor:
        """Return a tensor of its own, on the CPU; raises :class:`ExportError` for numbers that it cannot hold."""
        found = self.value.detach().to(device="cpu", dtype=self.dtype, copy=True).contiguous()
        if not found.isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            raise ExportError(f"{self.name} has numbers that {kind} cannot hold: write engine-bf16 or engine-fp32")
        return found


def stored_tensors(model: nn.Module, dtype: torch.dtype) -> list[Stored]:
    """Return a model's tensors by the names of checkpoints: experts apart, a shared embedding once.

    Correction biases of routers stay in float32: they are added to scores, and choose experts.

    Raises:
        UnsupportedModelError: for stacked weights that are no experts of DeepSeek-V3's kind.
    """
    tied = family_of(model) != DEEPSEEK and bool(model.config.tie_word_embeddings)  # type: ignore[union-attr]
    found = []
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        kind = torch.float32 if name.endswith(_BIAS) else dtype
        found += [Stored(own, part, kind) for own, part in _apart(name, value)]
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
    parts = list(_sharded(stored, shard))
    single = len(parts) == 1 and not mtp
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = SINGLE if single else f"model-{number:05}-of-{len(parts):05}.safetensors"
        _save({one.name: one.cast() for one in part}, folder / file)
        index |= {one.name: file for one in part}
    if mtp:
        _save(dict(mtp), folder / MTP)
        index |= dict.fromkeys(mtp, MTP)
    if not single:
        size = sum(one.size for part in parts for one in part) + sum(value.nbytes for value in mtp.values())
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
