"""Backbones: one file a family, each giving ``geometry``, ``wrap_blocks`` and ``unwrap_blocks``.

The public verbs are here and know no family: they find the file for a model, resolve the schedule and check it.
A family file is imported only when one of its models turns up.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TypeVar

from torch import nn

from pyra.config import PyraConfig
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ConfigError, ScheduleError, UnsupportedModelError
from pyra.schedule import check_schedule, preset_schedule, solve_schedule

Model = TypeVar("Model", bound=nn.Module)
InputSize = int | tuple[int, int]

# Where a model's class (or a class it derives from) is defined -> the file of its family.
_FAMILIES = (("timm.", "pyra.backbones.timm_vit"),)


def wrap(model: Model, config: PyraConfig) -> Model:
    """Make ``model`` merge tokens, in place.

    Every parameter keeps its name; blocks that merge gain a ``reactivation`` module. With an all-zero schedule the
    model is left as it is. Wrapping again with an equal configuration changes nothing; another configuration replaces
    the first (re-activation weights start anew).

    Args:
        model: a supported backbone, before any PEFT method is attached (or use :func:`pyra.adapters.adapt`).
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
    family = family_of(model)
    sizes = geometry(model)
    schedule = list(config.schedule) if config.schedule is not None else solve_schedule(sizes, rate=config.rate)
    check_schedule(schedule, sizes)
    if wrapped_config(model) == config and wrapped_schedule(model) == schedule:
        return model
    unwrap(model)
    if any(schedule):
        family.wrap_blocks(model, schedule, config)
    model.pyra_config = config  # type: ignore[assignment]
    model.pyra_schedule = tuple(schedule)  # type: ignore[assignment]
    return model


def unwrap(model: Model) -> Model:
    """Undo :func:`wrap` in place and return ``model``: the very blocks it had, with whatever was trained in them."""
    if wrapped_config(model) is not None:
        if any(wrapped_schedule(model) or ()):
            family_of(model).unwrap_blocks(model)
        del model.pyra_config, model.pyra_schedule
    return model


def wrapped_config(model: nn.Module) -> PyraConfig | None:
    """Return the configuration ``model`` (or the model inside a PEFT model) is wrapped with, or None."""
    return getattr(_backbone(model), "pyra_config", None)


def wrapped_schedule(model: nn.Module) -> list[int] | None:
    """Return the tokens removed in each block of a wrapped model, or None."""
    schedule = getattr(_backbone(model), "pyra_schedule", None)
    return None if schedule is None else list(schedule)


def geometry(model: nn.Module, input_size: InputSize | None = None) -> Geometry:
    """Return the sizes that the cost of ``model`` depends on.

    Args:
        model: a supported backbone, wrapped or not, with or without PEFT layers (which are not counted).
        input_size: image side or (height, width) in pixels; None means the model's own.

    Raises:
        UnsupportedModelError: for a model of no supported family.
        ValueError: for an input size that does not fit the patches.
    """
    model = _backbone(model)
    result: Geometry = family_of(model).geometry(model, input_size)
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
        preset: ``"low"`` or ``"high"``, the published schedule of this model.
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
    architecture = getattr(_backbone(model), "pretrained_cfg", {}).get("architecture", type(model).__name__)
    schedule = preset_schedule(architecture, preset)
    check_schedule(schedule, sizes)
    return schedule


def family_of(model: nn.Module) -> ModuleType:
    """Return the family module of a backbone; raises :class:`UnsupportedModelError` where there is none."""
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} already carries a PEFT method: wrap the backbone first, "
            "or let pyra.adapters.adapt(model, pyra=..., peft=...) do both"
        )
    for home, family in _FAMILIES:
        if any(f"{cls.__module__}.".startswith(home) for cls in type(model).__mro__):
            return importlib.import_module(family)
    raise UnsupportedModelError(
        f"{type(model).__name__} is of no supported family; supported are timm's plain VisionTransformer models"
    )


def _backbone(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
