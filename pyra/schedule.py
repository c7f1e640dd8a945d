"""Schedules: how many tokens each layer removes, from a rate, a MACs target or a published preset.

A schedule is a list of ``r``, one entry a layer. Rate = 1 - MACs(compressed) / MACs(original).

Shape: even steps lose least accuracy, large late ones most, so a target that equal steps can reach gets equal steps
(the published "low" shape). Beyond that tokens would run out, and the steps bend to a share of the tokens still there,
``r_l ~ N_l ** bend`` with the smallest bend that reaches the target (bend 1, a constant share, is the shape of the
published "high" schedules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real

from pyra.cost import Geometry, geometry_macs, token_counts
from pyra.errors import ScheduleError, did_you_mean
from pyra.matching import removable

_VIT_B_HIGH = (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3)
_VIT_B_LOW = (*(16,) * 11, 10)
_VIT_L_HIGH = (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1)
_VIT_L_LOW = (*(8,) * 23, 6)
_DEIT_LOW = (*(16,) * 6, *(10,) * 6)

# Tokens removed a layer in the paper's experiments (arXiv 2403.09192, appendix): 224 px, patch 16.
PRESETS: dict[str, dict[str, tuple[int, ...]]] = {
    "vit_base_patch16_224": {"low": _VIT_B_LOW, "high": _VIT_B_HIGH},
    "vit_large_patch16_224": {"low": _VIT_L_LOW, "high": _VIT_L_HIGH},
    "deit_base_distilled_patch16_224": {"low": _DEIT_LOW, "high": _VIT_B_HIGH},
}

_STEPS = 40  # bisection steps: far below one token
_MAX_BEND = 6.0


def preset_schedule(backbone: str, level: str) -> list[int]:
    """Return a published schedule.

    Args:
        backbone: timm name of one of the paper's models, with or without a pretrained tag.
        level: ``"low"`` (about 2 x fewer MACs) or ``"high"`` (about 3.4 x).

    Raises:
        ScheduleError: for a backbone or level without a published schedule.

    Example:
        >>> sum(preset_schedule("vit_base_patch16_224.augreg_in21k", "high"))
        192
    """
    name = backbone.split(".")[0]
    if name not in PRESETS:
        raise ScheduleError(
            f"no published schedule for {backbone!r}{did_you_mean(name, PRESETS)}; there are some for "
            f"{', '.join(PRESETS)}; use a rate instead"
        )
    if level not in PRESETS[name]:
        raise ScheduleError(f"unknown level {level!r}; {name} has {', '.join(PRESETS[name])}")
    return list(PRESETS[name][level])


def schedule_problems(schedule: Sequence[int], geometry: Geometry) -> list[str]:
    """List everything that keeps ``schedule`` from running on a model of this geometry (empty: it fits)."""
    problems = []
    if len(schedule) != geometry.depth:
        problems.append(f"it has {len(schedule)} entries, the model has {geometry.depth} blocks")
    tokens = geometry.tokens
    for layer, removed in enumerate(schedule):
        if isinstance(removed, bool) or not isinstance(removed, Integral):
            problems.append(f"block {layer} removes {removed!r}: not a whole number")
            continue
        if removed < 0:
            problems.append(f"block {layer} removes {removed}: negative")
            continue
        most = removable(tokens, geometry.prefix_tokens)
        if removed > most:
            problems.append(f"block {layer} removes {removed} of {tokens} tokens: at most {most} can go")
        tokens -= min(removed, most)
    return problems


def check_schedule(schedule: Sequence[int], geometry: Geometry) -> None:
    """Raise :class:`ScheduleError` with all problems at once where the schedule does not fit."""
    problems = schedule_problems(schedule, geometry)
    if problems:
        raise ScheduleError(f"the schedule {list(schedule)} does not fit: " + "; ".join(problems))


def solve_schedule(geometry: Geometry, rate: float | None = None, macs: int | None = None) -> list[int]:
    """Find the schedule for a rate or a MACs target.

    Args:
        geometry: sizes of the backbone.
        rate: share of the MACs to save, in [0, 1).
        macs: MACs to stay within.

    Returns:
        Tokens to remove in each block; its MACs are at most the target.

    Raises:
        ScheduleError: unless exactly one target is given, or where merging cannot reach it (the message says how far
            it can go).
    """
    if (rate is None) == (macs is None):
        raise ScheduleError("give exactly one of rate and macs")
    plain = geometry_macs(geometry)
    if rate is not None:
        if not isinstance(rate, Real) or not 0 <= rate < 1:
            raise ScheduleError(f"rate must be a number in [0, 1), got {rate!r}")
        target = plain * (1 - rate)
    else:
        assert macs is not None
        if not isinstance(macs, Real) or not 0 < macs < float("inf"):
            raise ScheduleError(f"macs must be a positive number, got {macs!r}")
        target = float(macs)
    if target >= plain:
        return [0] * geometry.depth

    def cost(schedule: list[int]) -> int:
        return geometry_macs(geometry, schedule)

    smallest = _schedule(geometry, _MAX_BEND, 1.0)
    if cost(smallest) > target:
        most = 1 - cost(smallest) / plain
        raise ScheduleError(
            f"merging can save at most {most:.3f} of this model's MACs, asked for {1 - target / plain:.3f}"
        )
    if cost(_schedule(geometry, 0.0, 1.0)) <= target:
        return _bisect(lambda t: _schedule(geometry, 0.0, t), cost, target, 0.0, 1.0)
    return _bisect(lambda bend: _schedule(geometry, bend, 1.0), cost, target, 0.0, _MAX_BEND)


def _bisect(
    make: Callable[[float], list[int]], cost: Callable[[list[int]], int], target: float, low: float, high: float
) -> list[int]:
    """Smallest parameter in [low, high] whose schedule stays within the target."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(make(middle)) <= target else (middle, high)
    return make(high)


def _schedule(geometry: Geometry, bend: float, strength: float) -> list[int]:
    """Whole-token schedule of one shape; strength 1 leaves about two tokens beside the prefix at the end."""
    free = geometry.tokens - geometry.prefix_tokens
    floor = min(free, 2)
    # The scale for which the continuous trajectory N' = -scale * N ** bend ends at the floor, by bisection.
    low, high = 0.0, float(free)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _end(free, geometry.depth, bend, middle) > floor else (low, middle)
    scale = low * strength
    schedule, exact, tokens = [], float(free), geometry.tokens
    for _ in range(geometry.depth):
        exact = max(exact - scale * (exact / free) ** bend, float(floor))
        removed = tokens - geometry.prefix_tokens - round(exact)
        removed = max(0, min(removed, removable(tokens, geometry.prefix_tokens)))
        schedule.append(removed)
        tokens -= removed
    return schedule


def _end(free: int, depth: int, bend: float, scale: float) -> float:
    tokens = float(free)
    for _ in range(depth):
        tokens -= scale * (tokens / free) ** bend
        if tokens <= 0:
            return 0.0
    return tokens


__all__ = [
    "PRESETS",
    "check_schedule",
    "preset_schedule",
    "schedule_problems",
    "solve_schedule",
    "token_counts",
]
