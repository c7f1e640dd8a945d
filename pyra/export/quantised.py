"""``torchao-int8`` and ``torchao-int4``: the folded model with its linear layers quantised by torchao.

The folder is one of the format ``hf`` whose quantised weights stand as integers and scales. To open it, the model that
``config.json`` describes is made and quantised the same way, and what the file holds is copied into its weights: no
tensor class comes from the file.

A model that was trained as ``torchao-int4`` rounds it (:mod:`pyra.export.linear_training`) gives the very values that
its forward used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.errors import ExportError, PyraError
from pyra.export import hf
from pyra.export.linear_training import GROUP, fits, int4_config, int4_type, is_rounded, trains_as_rounded
from pyra.export.loading import damaged
from pyra.export.logits import logits_of
from pyra.export.programs import with_threads

if TYPE_CHECKING:
    from pyra.export.exporting import Job
    from pyra.export.record import ExportRecord

INT8 = "torchao-int8"
_PACKED = ".packed"


def write(model: nn.Module, staging: Path, job: Job) -> None:
    """Write a folded model, quantised."""
    hf.write(model, staging, job)
    path = staging / hf.WEIGHTS
    path.unlink()
    quantise(model.float(), job.format.name)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for key, part in _parts(name, value):
            state[key] = _pack(part) if key.endswith(_PACKED) else part.contiguous()
    save_file(state, path)


def open_file(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Callable[[Tensor], Tensor]:
    """Open the folder as a callable on pixel values."""
    path = folder / hf.WEIGHTS
    try:
        state = load_file(path)
    except Exception as error:  # safetensors raises a class of its own for each defect
        raise damaged(path, error) from None
    values = hf.read_config(folder / hf.CONFIG)
    try:
        model = hf.empty_model(folder, values)
    except PyraError as error:
        raise error if isinstance(error, ExportError) else ExportError(f"{folder}: {error}") from None
    hf.give_lengths(model, state)
    quantise(model, record.format)
    _fill(model, state, path)
    return with_threads(lambda pixel_values: logits_of(model(pixel_values)), threads)


def quantise(model: nn.Module, format: str) -> None:
    """Quantise the linear layers of a model in place.

    Raises:
        ExportError: where it has none that could be.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    logging.getLogger("torchao").setLevel(logging.ERROR)
    if format != INT8 and trains_as_rounded(model):
        from torchao.quantization.qat import QATConfig

        convert: Any = QATConfig(int4_config(), step="convert")
        quantize_(model.eval(), convert, filter_fn=lambda module, name: is_rounded(module))
    else:
        config = Int8DynamicActivationInt8WeightConfig() if format == INT8 else int4_config()
        quantize_(model.eval(), config, filter_fn=fits)
    model.requires_grad_(False)
    if not any(_inner(value) for value in model.state_dict().values()):
        raise ExportError(f"this model has no linear layers of a multiple of {GROUP} inputs to quantise")


def _inner(value: Any) -> list[str]:
    """Return the names of the tensors that a quantised tensor consists of; none for an ordinary one."""
    names = [*getattr(value, "tensor_data_names", ()), *getattr(value, "optional_tensor_data_names", ())]
    return [name for name in names if isinstance(getattr(value, name, None), Tensor)]


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    inner = _inner(value)
    if not inner:
        yield name, value
    for part in inner:
        four = getattr(value, "target_dtype", None) == int4_type() and part == "qdata"
        yield f"{name}.{part}{_PACKED if four else ''}", getattr(value, part)


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    problems, placed = [], set()
    for name, value in model.state_dict().items():
        for key, part in _parts(name, value):
            if key not in state:
                problems.append(f"{key} is not in the file")
                continue
            placed.add(key)
            stored = _unpack(state[key], part.shape) if key.endswith(_PACKED) else state[key]
            if stored is None or stored.shape != part.shape or stored.dtype != part.dtype:
                problems.append(f"{key} is {state[key].dtype} {list(state[key].shape)}, which does not fit")
            elif stored.is_floating_point() and not stored.isfinite().all():
                problems.append(f"{key} holds NaN or infinite values")
            else:
                part.copy_(stored)
    problems += [f"{key} has no place in the model" for key in state if key not in placed]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ExportError(f"{path} does not fit its {hf.CONFIG}: {shown}")


def _pack(values: Tensor) -> Tensor:
    """Return two values of -8..7 a byte."""
    pairs = (values.reshape(-1, 2) + 8).to(torch.uint8)
    return pairs[:, 0] | pairs[:, 1] << 4


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor | None:
    if packed.dtype != torch.uint8 or packed.ndim != 1 or 2 * packed.numel() != shape.numel():
        return None
    return (torch.stack([packed & 15, packed >> 4], dim=1).to(torch.int8) - 8).reshape(shape)
