"""Weights for engines: a matrix an expert, in shards that are cast or rounded and written one after another.

Of a matrix that is rounded (compressed-tensors' ``pack-quantized``) a shard holds ``weight_packed`` (eight integers in
a word of 32 bits, the lowest bits first, shifted by 8), ``weight_scale`` (float32, a group of inputs each) and
``weight_shape``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyra.backbones.joyai_folder import INDEX, MTP, SINGLE
from pyra.backbones.joyai_mtp_weights import without_mtp
from pyra.checkpoints import writing
from pyra.errors import ExportError, UnsupportedModelError
from pyra.experts.quantising import QuantisingConfig, quantise, rounded
from pyra.export.engine_config import family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.export.engine_rounding import Rounding
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
        own = self.value.detach()
        if not own.isfinite().all():
            raise ExportError(f"{self.name} holds NaN or infinite values: there is nothing to write")
        if self.rounding is not None:
            values, scale = quantise(own, self.rounding)
            shape = torch.tensor(own.shape)
            return {
                f"{self.name}_packed": pack(values).cpu(),
                f"{self.name}_scale": scale.cpu(),
                f"{self.name}_shape": shape,
            }
        cast = own.cpu().to(self.dtype, copy=True).contiguous()
        if not cast.isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            raise ExportError(f"{self.name} has numbers that {kind} cannot hold: write engine-bf16 or engine-fp32")
        return {self.name: cast}

    def meant(self) -> Tensor:
        """Return the weight that is read back, on its device: cast, or rounded in its own type."""
        own = self.value.detach()
        return own.to(self.dtype) if self.rounding is None else rounded(own, self.rounding)


def pack(values: Tensor) -> Tensor:
    """Return integers of -8 to 7 [R, C], C a multiple of 8, as words of 32 bits [R, C / 8].

    >>> pack(torch.tensor([[1, 0, -8, 0, 0, 0, 0, 7]], dtype=torch.int8)).item() & 0xFFFFFFFF == 0xF8888089
    True
    """
    nibbles = (values.to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (nibbles << shifts).sum(dim=-1, dtype=torch.int32)


def stored_tensors(model: nn.Module, dtype: torch.dtype | None, rounding: Rounding | None = None) -> list[Stored]:
    """Return a model's tensors by the names of checkpoints: experts apart, a shared embedding once.

    Correction biases of routers stay in float32: they are added to scores, and choose experts.

    Args:
        model: folded, nothing merging.
        dtype: of what stays float; None leaves each tensor its own.
        rounding: what becomes integers; None for floats.

    Raises:
        UnsupportedModelError: for stacked weights that are no experts of DeepSeek-V3's kind.
    """
    tied = family_of(model) != DEEPSEEK and bool(model.config.tie_word_embeddings)  # type: ignore[union-attr]
    found = []
    for name, value in without_mtp(model.state_dict()).items():
        if tied and name == "lm_head.weight":
            continue
        kind = value.dtype if dtype is None else torch.float32 if name.endswith(_BIAS) else dtype
        how = rounding.config if rounding is not None and name in rounding.weights else None
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


def write_weights(shards: Sequence[Sequence[Stored]], folder: Path, mtp: Mapping[str, Tensor]) -> None:
    """Write shards and their index, or one file without; those of MTP layers in a shard of their own.

    Args:
        shards: of :func:`by_size` or :func:`by_layer`; memory beside the model is that of the largest as it is written.
        folder: to write to.
        mtp: weights of MTP layers, as they are written.
    """
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


def by_layer(stored: Iterable[Stored], layers: int) -> list[list[Stored]]:
    """Put the tensors of each decoder layer into a shard; the embedding goes with the first, the head with the last."""
    shards: list[list[Stored]] = [[] for _ in range(layers)]
    for one in stored:
        number = one.name.split(".")[2] if one.name.startswith("model.layers.") else ""
        shards[int(number) if number else 0 if "embed_tokens" in one.name else -1].append(one)
    return shards


def by_size(stored: Iterable[Stored], most: int = SHARD) -> list[list[Stored]]:
    """Put tensors, in their order, into shards of at most so many bytes, where no single tensor has more."""
    shards: list[list[Stored]] = []
    size = 0
    for one in stored:
        if not shards or size + one.size > most:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.size
    return shards
