"""Backbones: one file a family, and the verbs that know none of them.

A family file gives ``obstacle`` (why a model cannot be merged), ``geometry``, ``patch_grid``, ``layers``, ``MERGING``
(the layer that merges), ``prepare`` and ``restore`` (what else changes in a wrapped model) and ``features``. It is
imported only when one of its models turns up. What all families share is in :mod:`pyra.backbones.layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from pyra.backbones.layers import (
    REACTIVATION,
    MergingLayer,
    Step,
    merging_layers,
    patched_forward,
    replace_layers,
    restore_layers,
    switch_layers,
)
from pyra.config import PyraConfig
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ConfigError, ScheduleError, UnsupportedModelError
from pyra.schedule import check_schedule, preset_for, solve_schedule

Model = TypeVar("Model", bound=nn.Module)
InputSize = int | tuple[int, int]
_GRID = 16  # schedules looked at within a range of rates
_RATE_STEP = 0.01  # a schedule of whole tokens misses its rate by less

# Where a model's class (or a class it derives from) is defined -> the file of its family; the first match counts.
_FAMILIES = (
    ("timm.models.eva.", "pyra.backbones.timm_eva"),
    ("timm.", "pyra.backbones.timm_vit"),
    ("transformers.", "pyra.backbones.hf_vision"),
)


def wrap(model: Model, config: PyraConfig) -> Model:
    """Make ``model`` merge tokens, in place.

    Every parameter keeps its name; layers that merge gain a ``reactivation`` module, and the model a method
    ``set_rate`` (:func:`set_rate`). With an all-zero schedule its layers are left as they are. Wrapping again with an
    equal configuration changes nothing; another configuration replaces the first (re-activation weights start anew).

    Args:
        model: a supported backbone, alone, under a head, in a two-tower model, or inside a PEFT model
            (:func:`pyra.adapters.adapt` wraps and attaches a PEFT method at once).
        config: what to merge.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: where the model's tokens cannot be merged, with the reason.
        ScheduleError: where the schedule does not fit, with all problems.
        ConfigError: where ``config`` is not a configuration.

    Example:
        >>> model = wrap(timm.create_model("vit_base_patch16_224"), PyraConfig(rate=0.5))  # doctest: +SKIP
    """
    if not isinstance(config, PyraConfig):
        raise ConfigError(f"wrap needs a PyraConfig, such as PyraConfig(rate=0.5); got {config!r}")
    family, core = locate(model)
    sizes, schedule = family.geometry(core, None), schedule_of(model, config)
    if _is_in_force(model, config) and wrapped_schedule(model) == schedule:
        return model
    grid = family.patch_grid(core)
    pairs = most_removed(sizes, schedule, config)
    if any(pairs):
        _refuse_patched(family.layers(core))
    unwrap(model)
    if any(pairs):
        replace_layers(family.layers(core), _steps(sizes, schedule, pairs, config, grid), family.MERGING)
        family.prepare(core)
    core.pyra_config = config  # type: ignore[assignment]
    core.pyra_schedule = tuple(schedule)  # type: ignore[assignment]
    outer = _outer(model)
    outer.set_rate = functools.partial(set_rate, outer)  # type: ignore[assignment]
    return model


def unwrap(model: Model) -> Model:
    """Undo :func:`wrap` in place and return ``model``: the very layers it had, with whatever was trained in them.

    A model that is not wrapped is returned as it is.

    Raises:
        UnsupportedModelError: where other modules were put around its layers since.
    """
    if wrapped_config(model) is not None:
        core = _core(model)
        family: Any = _family(core)
        if next(merging_layers(core), None) is not None:
            in_place = [layer for layer in family.layers(core) if isinstance(layer, MergingLayer)]
            if in_place != list(merging_layers(core)):
                raise UnsupportedModelError(
                    "modules were put around layers that merge (checkpoint wrappers, torch.compile): take them off "
                    "before unwrapping"
                )
            restore_layers(family.layers(core))
            family.restore(core)
        del core.pyra_config, core.pyra_schedule
        _outer(model).__dict__.pop("set_rate", None)
    return model


def set_rate(model: Model, rate: float | None = None, *, schedule: list[int] | None = None) -> Model:
    """Switch a wrapped model to another rate, in place; its weights stay as they are.

    Re-activation weights belong to the rank of a pair: fewer pairs read the first rows, and pairs beyond the last row
    do not contribute to the channel weights. A layer that did not merge before merges without them.

    Args:
        model: wrapped, alone or inside a PEFT model, training or not.
        rate: share of the MACs to save, in [0, 1).
        schedule: tokens removed in each layer, instead.

    Returns:
        ``model``. Its configuration and schedule are the new ones.

    Raises:
        ConfigError: for a model that is not wrapped, or unless exactly one of ``rate`` and ``schedule`` is given.
        ScheduleError: where the schedule does not fit or the rate cannot be reached. Nothing has then changed.

    A rate outside those that the weights are for is warned of.

    Example:
        >>> set_rate(model, 0.5)  # doctest: +SKIP
    """
    before, sizes = wrapped_config(model), geometry(model)
    if before is None:
        raise ConfigError("set_rate switches a model that merges tokens: wrap or adapt it first")
    known = before.rate_range or [_rate_of(sizes, wrapped_schedule(model) or [])] * 2
    config = dataclasses.replace(before, rate=rate, schedule=schedule, rate_range=known)
    new = schedule_of(model, config)
    asked = _rate_of(sizes, new)
    trained = before.rate_range is not None or any(hasattr(x, REACTIVATION) for x in merging_layers(_core(model)))
    if trained and not known[0] - _RATE_STEP <= asked <= known[1] + _RATE_STEP:
        warnings.warn(
            f"rate {asked:.2f} is outside what these weights are for ({_said(known)}): expect a loss of accuracy, or "
            "train with a rate_range that holds it",
            stacklevel=2,
        )
    switch(model, config, new)
    return model


def switch(model: nn.Module, config: PyraConfig, schedule: list[int]) -> None:
    """Give a wrapped model another configuration and schedule, which fits; weights stay as they are."""
    core = _core(model)
    standing = {layer.step.layer: layer for layer in merging_layers(core)}
    if standing.keys() >= {layer for layer, removed in enumerate(schedule) if removed}:
        for index, layer in standing.items():
            layer.step = dataclasses.replace(layer.step, removed=schedule[index], config=config)
    else:
        _replace_more(model, config, schedule)
    core.pyra_config = config  # type: ignore[assignment]
    core.pyra_schedule = tuple(schedule)  # type: ignore[assignment]


def _replace_more(model: nn.Module, config: PyraConfig, schedule: list[int]) -> None:
    """Let layers merge that did not stand in so far."""
    family, core = locate(model)
    layers, plain = family.layers(core), next(merging_layers(core), None) is None
    _refuse_patched(layers)
    steps = _steps(family.geometry(core, None), schedule, [0] * len(schedule), config, family.patch_grid(core))
    switch_layers(layers, steps, family.MERGING)
    if plain:
        family.prepare(core)


def schedule_of(model: nn.Module, config: PyraConfig) -> list[int]:
    """Return the tokens that a configuration removes in each layer of a model.

    Raises:
        ScheduleError: where the schedule does not fit or the rate cannot be reached.
        UnsupportedModelError: where the model's tokens cannot merge, or not so.
    """
    family, core = locate(model)
    drop = getattr(core, "patch_drop", None)  # an identity, or none, where patches are not dropped in training
    ordered = type(drop) in (type(None), nn.Identity)
    if config.matching == "local" and (not ordered or family.patch_grid(core) is None):
        raise UnsupportedModelError(
            f"{type(core).__name__} has its patches in no fixed order: matching='local' needs a grid; use another"
        )
    sizes = family.geometry(core, None)
    schedule = list(config.schedule) if config.schedule is not None else solve_schedule(sizes, rate=config.rate)
    check_schedule(schedule, sizes)
    return schedule


def _is_in_force(model: nn.Module, config: PyraConfig) -> bool:
    """Whether a model is wrapped so; a range that :func:`set_rate` noted is not asked for again."""
    current = wrapped_config(model)
    if current is not None and config.rate_range is None:
        current = dataclasses.replace(current, rate_range=None)
    return current == config


def _refuse_patched(layers: Iterable[nn.Module]) -> None:
    patched = next(filter(None, map(patched_forward, layers)), None)
    if patched is not None:
        raise UnsupportedModelError(
            f"{patched} has a forward of its own on the instance (patched, or hooked by accelerate), which merging "
            "would pass by: wrap the model first, or use forward hooks"
        )


def most_removed(sizes: Geometry, schedule: list[int], config: PyraConfig) -> list[int]:
    """Return the most tokens that each layer removes at any rate of a configuration."""
    schedules = [schedule]
    if config.rate_range is not None:
        lowest, highest = config.rate_range
        rates = (lowest + (highest - lowest) * point / _GRID for point in range(_GRID + 1))
        schedules += [solve_schedule(sizes, rate=rate) for rate in rates]
    return [max(removed) for removed in zip(*schedules, strict=True)]


def _rate_of(sizes: Geometry, schedule: list[int]) -> float:
    return 1 - geometry_macs(sizes, schedule) / geometry_macs(sizes)


def _said(rates: list[float]) -> str:
    lowest, highest = (f"{rate:.2f}" for rate in rates)
    return f"rate {lowest}" if lowest == highest else f"rates {lowest} to {highest}"


def _steps(
    sizes: Geometry, schedule: list[int], pairs: list[int], config: PyraConfig, grid: tuple[int, int] | None
) -> list[Step]:
    return [
        Step(layer, sizes.depth, removed, most, sizes.prefix_tokens, sizes.dim, config, grid)
        for layer, (removed, most) in enumerate(zip(schedule, pairs, strict=True))
    ]


def wrapped_config(model: nn.Module) -> PyraConfig | None:
    """Return the configuration ``model`` (or the backbone inside it) is wrapped with, or None."""
    return getattr(_core(model), "pyra_config", None)


def wrapped_schedule(model: nn.Module) -> list[int] | None:
    """Return the tokens removed in each layer of a wrapped model, or None."""
    schedule = getattr(_core(model), "pyra_schedule", None)
    return None if schedule is None else list(schedule)


def geometry(model: nn.Module, input_size: InputSize | None = None) -> Geometry:
    """Return the sizes that the cost of ``model`` depends on.

    Args:
        model: a supported backbone, wrapped or not, with or without PEFT layers (which are not counted).
        input_size: image side or (height, width) in pixels; None means the model's own.

    Raises:
        UnsupportedModelError: for a model whose tokens cannot be merged, with the reason.
        ValueError: for an input size that does not fit the patches.
    """
    family, core = locate(model)
    size: object = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and not (
        isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError(f"input size must be a positive number of pixels or (height, width), got {input_size!r}")
    result: Geometry = family.geometry(core, size)
    return result


def macs(model: nn.Module, schedule: list[int] | None = None, input_size: InputSize | None = None) -> int:
    """Count the multiply-accumulates of one input; what is counted stands in :mod:`pyra.cost`.

    Args:
        model: a supported backbone, wrapped or not.
        schedule: tokens removed in each block; None means as the model runs (its own schedule if wrapped).
        input_size: image side or (height, width) in pixels; None means the model's own.

    Raises:
        ScheduleError: where the schedule does not fit.
    """
    sizes = geometry(model, input_size)
    if schedule is None:
        schedule = wrapped_schedule(model) or [0] * sizes.depth
    check_schedule(schedule, sizes)
    return geometry_macs(sizes, schedule)


def schedule_for(
    model: nn.Module,
    rate: float | None = None,
    macs: int | None = None,
    preset: str | None = None,
    input_size: InputSize | None = None,
) -> list[int]:
    """Find the schedule of a model for one target.

    Args:
        model: a supported backbone, wrapped or not.
        rate: share of the MACs to save, in [0, 1).
        macs: MACs to stay within.
        preset: ``"low"`` or ``"high"``, the published schedule of this model, or its shape carried over to the
            depth and token count of another.
        input_size: image side or (height, width) in pixels; None means the model's own.

    Returns:
        Tokens removed in each block.

    Raises:
        ScheduleError: unless exactly one target is given, or where it cannot be reached.
    """
    if sum(target is not None for target in (rate, macs, preset)) != 1:
        raise ScheduleError("give exactly one of rate, macs and preset")
    sizes = geometry(model, input_size)
    if preset is None:
        return solve_schedule(sizes, rate=rate, macs=macs)
    return preset_for(sizes, preset)


def locate(model: nn.Module) -> tuple[ModuleType, nn.Module]:
    """Find the family of a model, and the module in it that has the layers.

    Raises:
        UnsupportedModelError: where the model's tokens cannot be merged, with the reason.
    """
    core = _core(model)
    family = _family(core)
    if family is None:
        raise UnsupportedModelError(
            f"{type(core).__name__} is of no supported family; supported are plain vision transformers of timm "
            "(VisionTransformer, Eva) and transformers (ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, ViT-MAE)"
        )
    reason = _tied_to_a_grid(core) or family.obstacle(core)
    if reason is not None:
        name = getattr(core, "pretrained_cfg", {}).get("architecture") or type(core).__name__
        raise UnsupportedModelError(f"{name} cannot be merged: {reason}")
    return family, core


def _outer(model: nn.Module) -> nn.Module:
    """Return the model that the user made, inside a PEFT model."""
    outer: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return outer


def _core(model: nn.Module) -> nn.Module:
    """Return the backbone inside a PEFT model, transformers' wrapper of a timm model, a head or a two-tower model."""
    core = _outer(model)
    core = getattr(core, "timm_model", core)
    family = _family(core)
    return family.tower(core) if hasattr(family, "tower") else core  # type: ignore[union-attr]


def _family(core: nn.Module) -> ModuleType | None:
    for home, family in _FAMILIES:
        if any(f"{cls.__module__}.".startswith(home) for cls in type(core).__mro__):
            return importlib.import_module(family)
    return None


def _tied_to_a_grid(core: nn.Module) -> str | None:
    windows = False
    for module in core.modules():
        names = [*module._parameters, *module._buffers]
        names += [name for name, child in module.named_children() if _POSITIONS.search(name) and _has_tensors(child)]
        if any(map(_POSITIONS.search, names)):
            return "its attention adds a relative position bias for each pair of positions, which a merged token lacks"
        windows = windows or hasattr(module, "window_size") or getattr(module, "num_windows", 1) > 1
    return "it attends within windows of a fixed grid, which merged tokens no longer form" if windows else None


_POSITIONS = re.compile("relative_position|rel_pos")


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
