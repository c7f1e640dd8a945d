"""Backbones: one file a family, and the verbs that know none of them.

A family file gives ``obstacle`` (why a model cannot be merged), ``geometry``, ``patch_grid``, ``layers``, ``MERGING``
(the layer that merges), ``prepare`` and ``restore`` (what else changes in a wrapped model) and ``features``; that of
decoders also what their schedules mean (``schedule``, ``shares``, ``scaled``, ``rows``). It is imported only when one
of its models turns up. What all families share is in :mod:`pyra.backbones.layers`.
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
_DECODERS = "pyra.backbones.hf_decoder"  # the family of a model of transformers that embeds words


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
    pairs = most_removed(family, core, schedule, config)
    if any(pairs):
        _refuse_patched(family.layers(core))
    unwrap(model)
    if any(pairs):
        replace_layers(family.layers(core), _steps(family, sizes, schedule, pairs, config, grid), family.MERGING)
        family.prepare(core, _outer(model))
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
            family.restore(core, _outer(model))
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
    preset = None if schedule is not None else before.preset
    asked = {"rate": rate, "schedule": schedule, "keep": None, "preset": preset, "rate_range": known}
    config = dataclasses.replace(before, **asked)  # type: ignore[arg-type]
    new = schedule_of(model, config)
    saved = _rate_of(sizes, new)
    trained = before.rate_range is not None or any(hasattr(x, REACTIVATION) for x in merging_layers(_core(model)))
    if trained and not known[0] - _RATE_STEP <= saved <= known[1] + _RATE_STEP:
        warnings.warn(
            f"rate {saved:.2f} is outside what these weights are for ({_said(known)}): expect a loss of accuracy, or "
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
        left = _shares(_family(core), schedule)
        for index, layer in standing.items():
            layer.step = dataclasses.replace(layer.step, removed=schedule[index], config=config, share=left[index])
    else:
        _replace_more(model, config, schedule)
    core.pyra_config = config  # type: ignore[assignment]
    core.pyra_schedule = tuple(schedule)  # type: ignore[assignment]


def _replace_more(model: nn.Module, config: PyraConfig, schedule: list[int]) -> None:
    """Let layers merge that did not stand in so far."""
    family, core = locate(model)
    layers, plain = family.layers(core), next(merging_layers(core), None) is None
    _refuse_patched(layers)
    sizes, grid = family.geometry(core, None), family.patch_grid(core)
    switch_layers(layers, _steps(family, sizes, schedule, [0] * len(schedule), config, grid), family.MERGING)
    if plain:
        family.prepare(core, _outer(model))


def schedule_of(model: nn.Module, config: PyraConfig) -> list[int]:
    """Return the tokens that a configuration removes in each layer of a model.

    Raises:
        ScheduleError: where the schedule does not fit or the rate cannot be reached.
        UnsupportedModelError: where the model's tokens cannot merge, or not so.
        ConfigError: for options of another kind of model.
    """
    family, core = locate(model)
    if hasattr(family, "schedule"):
        found: list[int] = family.schedule(core, config)
        return found
    if config.decoder_options():
        raise ConfigError(f"{', '.join(config.decoder_options())}: options of decoders; {type(core).__name__} is none")
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


def most_removed(family: Any, core: nn.Module, schedule: list[int], config: PyraConfig) -> list[int]:
    """Return the rows of re-activation weights of each layer: as many as it removes at any rate of a configuration."""
    schedules = [schedule]
    if config.rate_range is not None:
        lowest, highest = config.rate_range
        rates = (lowest + (highest - lowest) * point / _GRID for point in range(_GRID + 1))
        schedules += [
            schedule_of(core, dataclasses.replace(config, rate=rate, schedule=None, keep=None)) for rate in rates
        ]
    most = [max(removed) for removed in zip(*schedules, strict=True)]
    rows: list[int] = family.rows(most) if hasattr(family, "rows") else most
    return rows


def _rate_of(sizes: Geometry, schedule: list[int]) -> float:
    return 1 - geometry_macs(sizes, schedule) / geometry_macs(sizes)


def _said(rates: list[float]) -> str:
    lowest, highest = (f"{rate:.2f}" for rate in rates)
    return f"rate {lowest}" if lowest == highest else f"rates {lowest} to {highest}"


def _steps(
    family: Any,
    sizes: Geometry,
    schedule: list[int],
    pairs: list[int],
    config: PyraConfig,
    grid: tuple[int, int] | None,
) -> list[Step]:
    left = _shares(family, schedule)
    return [
        Step(layer, sizes.depth, removed, most, sizes.prefix_tokens, sizes.dim, config, grid, left[layer])
        for layer, (removed, most) in enumerate(zip(schedule, pairs, strict=True))
    ]


def _shares(family: Any, schedule: list[int]) -> list[float]:
    shares: list[float] = family.shares(schedule) if hasattr(family, "shares") else [1.0] * len(schedule)
    return shares


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
        input_size: image side or (height, width) in pixels, or tokens of a prompt; None means the model's own (of a
            decoder: 1024 tokens).

    Raises:
        UnsupportedModelError: for a model whose tokens cannot be merged, with the reason.
        ValueError: for an input size that does not fit the patches.
    """
    family, core = locate(model)
    if hasattr(family, "shares"):  # of a decoder: tokens of a prompt
        if input_size is not None and (type(input_size) is not int or input_size < 1):
            raise ValueError(f"input size of a decoder must be a positive number of tokens, got {input_size!r}")
        sizes: Geometry = family.geometry(core, input_size)
        return sizes
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
        family: Any = _family(_core(model))
        if input_size is not None and hasattr(family, "scaled"):
            schedule = family.scaled(schedule, sizes)
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
    family: Any = _family(_core(model))
    if hasattr(family, "schedule"):
        if macs is not None or preset in ("low", "high"):
            raise ScheduleError("the schedule of a decoder is found for a rate, or preset 'safe' or 'fast'")
        found = schedule_of(model, PyraConfig(rate=rate, preset=preset))
        return found if input_size is None else list(family.scaled(found, sizes))
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
            "(VisionTransformer, Eva) and transformers (ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, ViT-MAE), and "
            "decoders of transformers that run as Llama does"
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
            family = _DECODERS if home == "transformers." and _embeds_words(core) else family
            return importlib.import_module(family)
    return None


def _embeds_words(model: Any) -> bool:
    base = getattr(model, "base_model", model)
    return hasattr(base, "embed_tokens") and isinstance(getattr(base, "layers", None), nn.ModuleList)


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is a decoder of transformers, alone, under a head or inside a PEFT model."""
    core = _outer(model)
    return any(cls.__module__.startswith("transformers.") for cls in type(core).__mro__) and _embeds_words(core)


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
