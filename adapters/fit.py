"""Whether stored tensors fit a backbone, and what differs where they do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyra.adapters.folder import StoredAdapter
from pyra.adapters.targets import REACTIVATION
from pyra.backbones import geometry
from pyra.checkpoints import value_problems
from pyra.errors import CheckpointError, UnsupportedModelError

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


def check_backbone(base: nn.Module, stored: StoredAdapter) -> None:
    """Raise :class:`CheckpointError` where an adapter that merges was saved from a backbone of other width or depth."""
    width, depth = _sizes(base)
    found = []
    if stored.schedule is not None and depth is not None and len(stored.schedule) != depth:
        found.append(_other("depth", len(stored.schedule), depth))
    stored_widths = {
        tensor.shape[-1]
        for key, tensor in stored.weights.items()
        if key.endswith(f".{REACTIVATION}.channel_weight") and tensor.ndim
    }
    if width is not None and stored_widths - {width}:
        found.append(_other("width", min(stored_widths - {width}), width))
    if found:
        raise CheckpointError(f"{stored.folder} does not fit this backbone: {' and '.join(found)}")


def check_fit(base: nn.Module, own: Mapping[str, Tensor], stored: StoredAdapter, needed: set[str]) -> None:
    """Compare stored tensors with the places they go to.

    Args:
        base: the backbone.
        own: the places.
        stored: the adapter.
        needed: names that must be stored.

    Raises:
        CheckpointError: for tensors that are missing, have no place, do not fit or hold no numbers, all named; what
            differs between the backbones comes first.
    """
    weights = stored.weights
    misfits = {key: tensor for key, tensor in weights.items() if key in own and own[key].shape != tensor.shape}
    problems = [f"{key} is not in the model" for key in weights if key not in own]
    problems += [f"{key} is not in the file" for key in sorted(needed - set(weights))]
    problems += [f"{k} is {list(tensor.shape)}, the model has {list(own[k].shape)}" for k, tensor in misfits.items()]
    if problems:
        problems = [*_differences(base, own, weights, misfits), *problems]
    # Some methods store indices beside their weights.
    indices = {key for key, tensor in weights.items() if key in own and own[key].dtype == tensor.dtype}
    indices = {key for key in indices if not weights[key].is_floating_point()}
    problems += value_problems({key: tensor for key, tensor in weights.items() if key not in indices})
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{stored.folder} does not fit this backbone: " + "; ".join(problems[:8]) + more)


def _differences(
    base: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], misfits: Mapping[str, Tensor]
) -> list[str]:
    """Depth by the highest block that has tensors or by the prompts of all layers, width by sides as wide as it."""
    stored_blocks, own_blocks = _blocks(weights), _blocks(own)
    found = [
        _other("depth", stored_blocks[path], own_blocks[path])
        for path in sorted(stored_blocks.keys() & own_blocks.keys())
        if stored_blocks[path] != own_blocks[path]
    ]
    found += [
        _other("depth", len(tensor), len(own[key]))
        for key, tensor in misfits.items()
        if key.endswith(".visual_prompts") and tensor.ndim and len(tensor) != len(own[key])
    ]
    width, _ = _sizes(base)
    sides = {
        int(theirs)
        for key, tensor in misfits.items()
        if tensor.ndim == own[key].ndim
        for theirs, ours in zip(tensor.shape, own[key].shape, strict=True)
        if ours == width and theirs != ours
    }
    if width is not None and sides:
        found.append(_other("width", min(sides), width))
    return found


def _other(what: str, theirs: int, ours: int) -> str:
    return f"it was saved from a backbone of {what} {theirs}, this one has {what} {ours}"


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Blocks of each list of blocks, as far as tensors tell."""
    counts: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.match, tensors)):
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Width and depth of a backbone; None where they are not known."""
    try:
        sizes = geometry(model)
        return sizes.dim, sizes.depth
    except UnsupportedModelError:
        config: Any = getattr(model, "config", None)
        return getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
