"""Checkpoints of a training: what is trained and no more, sealed when they are complete.

A checkpoint is the folder that ``transformers.Trainer`` writes (optimiser, schedule, random states, its state), with
the trained tensors in one file. ``complete.json`` is written last and holds the size and the SHA-256 of every file:
what has none, or does not match, is never read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.checkpoints import file_digest, writing
from pyra.errors import CheckpointError
from pyra.files import read_json, write_json

FOLDER = "checkpoints"
_TENSORS, _SEAL = "trained.safetensors", "complete.json"


def seal(folder: Path) -> None:
    """Declare a checkpoint complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _SEAL)
    record = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files
    }
    write_json(folder / _SEAL, record)


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint below a folder."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda entry: _step(entry), reverse=True)
    return next((entry for entry in found if _is_complete(entry)), None)


def drop_incomplete(folder: Path) -> None:
    """Remove what an interruption left half written, and checkpoints that are newer than the one to go on from."""
    kept = newest(folder)
    for entry in folder.glob("checkpoint-*"):
        if kept is None or _step(entry) > _step(kept):
            shutil.rmtree(entry)


def _step(entry: Path) -> int:
    number = entry.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_complete(entry: Path) -> bool:
    try:
        sealed = read_json(entry / _SEAL)
        return bool(sealed) and all(
            (entry / name).stat().st_size == record["bytes"] and file_digest(entry / name) == record["sha256"]
            for name, record in sealed.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes in a model, on the CPU: its trained parameters, whole, and the ranks of AdaLoRA."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "ranknum" in name:
            found[name] = whole(parameter.detach()).cpu().clone()
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold the weights in parts (FSDP2)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(value: Tensor) -> Tensor:
    """Return a tensor that may lie in parts in several processes; all of them ask for it."""
    gather: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


@torch.no_grad()
def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of :func:`trained_tensors` into a model.

    Raises:
        CheckpointError: where they are not the tensors that this model trains.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    expected = {name for name, p in model.named_parameters() if p.requires_grad or "ranknum" in name}
    wrong = sorted(expected ^ set(tensors)) or [n for n, p in own.items() if p.shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model: {len(wrong)} tensors differ, such as {wrong[0]}")
    for name, parameter in own.items():
        parameter.copy_(laid_out_as(parameter, tensors[name]))


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor in the parts that a parameter lies in."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(parameter, "placements")  # noqa: B009 - a DTensor's, which mypy does not know here
    return distribute_tensor(value.to(mesh.device_type), mesh, placements)


def write_tensors(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write named groups of tensors into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}/{name}": value.contiguous() for part, tensors in parts.items() for name, value in tensors.items()}
    with writing(folder / _TENSORS):
        save_file(flat, folder / _TENSORS)


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        CheckpointError: where the file cannot be read.
    """
    try:
        flat = load_file(folder / _TENSORS)
    except Exception as error:  # safetensors raises what it pleases
        raise CheckpointError(f"{folder / _TENSORS} cannot be read: {error}") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts
