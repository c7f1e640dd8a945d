"""The record of a model with fewer experts, ``compression.json``: what was kept, by which scores, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyra.errors import DataError
from pyra.experts.layers import expert_layers
from pyra.files import read_json
from pyra.records import record_problems

RECORD = "compression.json"
KIND = "experts"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model of the table: the whole one, or one with fewer experts or fewer of them active.

    Attributes:
        name: what the table calls it.
        experts: of each layer.
        active: experts of a token.
        parameters: of the model.
        bytes: of its parameters.
        active_parameters: without the experts that a token is not sent to.
        macs: multiply-accumulates of a token by weights: without attention among tokens.
        nll: nats a token of the answers of the test split.
        difference: of that to the whole model's; None for that itself.
        error: standard error of the difference, over examples in pairs.
    """

    name: str
    experts: int
    active: int
    parameters: int
    bytes: int
    active_parameters: int
    macs: int
    nll: float
    difference: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One mixture: its name, the experts that stayed, and the scores of all that it had."""

    name: str
    kept: list[int]
    reap: list[float]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What was done to a checkpoint.

    Attributes:
        options: it was done with; places of data are absolute.
        method: what rows of results call it.
        layers: with experts.
        variants: the rows of the table; the last one is what was written.
        calibration: ``examples``, ``tokens``, ``left_out`` and ``sha256`` of what experts were scored on.
        test: the same of what answers were scored on.
        source: ``model_type`` of the checkpoint, and the SHA-256 of its ``files`` of weights.
        written: ``model_type``, ``bytes`` of the files, ``left_out`` (what did not go along), and how the reloaded
            model compares: ``opened_with``, ``largest_difference`` of ``compared`` logits; None where that was skipped.
        environment: where it was done.
        kind: of the record.
        version: of its schema.
    """

    options: dict[str, Any]
    method: str
    layers: list[Layer]
    variants: list[Variant]
    calibration: dict[str, Any]
    test: dict[str, Any]
    source: dict[str, Any]
    written: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    kind: str = KIND
    version: int = 1


def is_compression(folder: str | Path) -> bool:
    """Whether a folder holds a model with fewer experts that ``pyra compress-experts`` wrote."""
    try:
        values = read_json(Path(folder) / RECORD)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("kind") == KIND


def read_compression(folder: str | Path) -> Compression:
    """Read the record of a folder; raises :class:`DataError` where it holds none, or a broken one."""
    path = Path(folder) / RECORD
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    problems = record_problems_of(values)
    if problems:
        raise DataError(f"{path} is no record of a compression: {'; '.join(problems[:4])}")
    lists = {"layers": [Layer(**one) for one in values["layers"]]}
    return Compression(**{**values, **lists, "variants": [Variant(**one) for one in values["variants"]]})


def record_problems_of(values: Any) -> list[str]:
    """List what keeps values from being a record."""
    plain = {**values, "layers": [], "variants": []} if isinstance(values, dict) else values
    problems = record_problems(Compression, plain)
    if problems:
        return problems
    if values["version"] != 1:
        return [f"it has version {values['version']}, this pyra reads 1"]
    for name, kind in (("layers", Layer), ("variants", Variant)):
        if not isinstance(values.get(name), list) or not values[name]:
            problems.append(f"{name} should be a list")
        else:
            problems += [problem for one in values[name] for problem in record_problems(kind, one)]
    return problems


def costs(model: nn.Module, experts: int, active: int) -> dict[str, int]:
    """Count what a model has with so many experts a layer and so many of them active; it may have more itself."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    embedding = model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    idle = 0
    for layer in expert_layers(model).values():
        stacks = (layer.experts.gate_up_proj, layer.experts.down_proj)
        one, row = sum(stack[0].numel() for stack in stacks), layer.gate.weight[0].numel()
        gone = layer.gate.num_experts - experts
        parameters -= gone * (one + row)
        matrices -= gone * (one + row)
        size -= gone * (sum(stack[0].numel() * stack.element_size() for stack in stacks))
        size -= gone * row * layer.gate.weight.element_size()
        idle += (experts - active) * one
    return {
        "parameters": parameters,
        "bytes": size,
        "active_parameters": parameters - idle,
        "macs": matrices - embedding - idle,
    }
