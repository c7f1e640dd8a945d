"""Schedules: how many tokens each layer removes, from a rate, a MACs target or a published preset.

A schedule is a list of ``r``, one entry a layer. Rate = 1 - MACs(compressed) / MACs(original).

Shape of a solved schedule: even steps lose least accuracy, large late ones most, so a target that equal steps can
reach gets equal steps (the published "low" shape). Beyond that tokens would run out, and the steps bend to a share of
the tokens still there, ``r_l ~ N_l ** bend`` with the smallest bend that reaches the target (bend 1, a constant share,
is the shape of the published "high" schedules). Past the last bend stands halving in every block, the most there is.

The published schedules are those of three models; :func:`preset_for` stretches their shape to any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
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

# Depth, tokens and prefix tokens of the models above: what a schedule depends on. ViT-Ti and ViT-S share ViT-B's.
_PUBLISHED = {
    (12, 197, 1): PRESETS["vit_base_patch16_224"],
    (24, 197, 1): PRESETS["vit_large_patch16_224"],
    (12, 198, 2): PRESETS["deit_base_distilled_patch16_224"],
}
_LEVELS = ("low", "high")
_PUBLISHED_PATCHES = 196  # 224 px in patches of 16

MAX_PRESSURE = 3.0  # of :func:`schedule_at`

_STEPS = 50  # bisection steps: far below one token, and below what _STAGGER sets apart
_MAX_BEND = 6.0
_STAGGER = 1e-6


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


def preset_for(geometry: Geometry, level: str) -> list[int]:
    """Return the published schedule of a level, stretched to a model of any depth and number of tokens.

    Where depth, tokens and prefix tokens are those of a published model, this is the published list itself.
    Otherwise the share of the patch tokens (all but the prefix) that the published schedule leaves at each relative
    depth, linear between its blocks, is kept: ViT-B's up to 18 blocks, ViT-L's from 19. The distilled DeiT's own "low"
    schedule, a slower one, holds for its exact geometry only; other models with several prefix tokens get ViT-B's or
    ViT-L's shape.

    Steps never increase from block to block, so where they are around one token the early blocks take them. A block
    removes at most half of its patch tokens, and what it cannot take goes to the blocks after it; what the last one
    cannot take stays: a token at most, more only in models shallower than the published one, where taking it earlier
    would bend the shape and overshoot the level's saving.

    Args:
        geometry: sizes of the backbone; only depth, tokens and prefix tokens matter.
        level: ``"low"`` (about 2 x fewer MACs) or ``"high"`` (about 3.4 x). Inputs of more tokens save a little more;
            fewer than six blocks cannot shed tokens that fast and save less.

    Returns:
        Tokens to remove in each block; it always fits the model, and is all zeros where nothing can merge.

    Raises:
        ScheduleError: for an unknown level.

    Example:
        >>> preset_for(Geometry(6, 65, 1, 384, 384, 2 * 384 * 1536, 64), "high")
        [24, 18, 10, 6, 3, 1]
    """
    if level not in _LEVELS:
        raise ScheduleError(
            f"unknown level {level!r}{did_you_mean(str(level), _LEVELS)}; there are {', '.join(_LEVELS)}"
        )
    exact = _PUBLISHED.get((geometry.depth, geometry.tokens, geometry.prefix_tokens))
    if exact is not None:
        return list(exact[level])
    nearest = min((12, 24), key=lambda depth: abs(depth - geometry.depth))
    published = _PUBLISHED[nearest, 197, 1][level]
    patches = max(geometry.tokens - geometry.prefix_tokens, 0)
    left = [round(patches * _share_left(published, block / geometry.depth)) for block in range(geometry.depth + 1)]
    # Rounding lets steps waver by one token; sorting undoes that, and keeps their sum.
    wanted = sorted((before - after for before, after in pairwise(left)), reverse=True)
    schedule, tokens, owed = [], geometry.tokens, 0
    for removed in wanted:
        owed += removed
        schedule.append(min(owed, removable(tokens, geometry.prefix_tokens)))
        owed -= schedule[-1]
        tokens -= schedule[-1]
    return schedule


def _share_left(published: Sequence[int], depth: float) -> float:
    """Share of the patch tokens that a published schedule leaves at a relative depth in [0, 1]."""
    left = [_PUBLISHED_PATCHES - removed for removed in accumulate(published, initial=0)]
    block = min(int(depth * len(published)), len(published) - 1)
    within = depth * len(published) - block
    return (left[block] + within * (left[block + 1] - left[block])) / _PUBLISHED_PATCHES


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
        if not geometry.halving:
            most = max(tokens - geometry.prefix_tokens, 0)
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
        Tokens to remove in each block. Its MACs are at most the target, and closer to it than the cost of one token in
        one block (one more for each block that halves its patch tokens). No step is more than one token larger than
        an earlier one.

    Raises:
        ScheduleError: unless exactly one target is given, or where merging cannot reach it (the message says how far
            it can go).

    Example:
        >>> solve_schedule(Geometry(6, 65, 1, 384, 384, 2 * 384 * 1536, 64), rate=0.4)
        [8, 8, 9, 8, 8, 8]
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
    return list(_solved(geometry, target, plain))


@functools.lru_cache(maxsize=1024)  # adapters that are switched and loaded on one backbone ask the same again
def _solved(geometry: Geometry, target: float, plain: int) -> tuple[int, ...]:
    if target >= plain:
        return (0,) * geometry.depth

    smallest = geometry_macs(geometry, schedule_at(geometry, MAX_PRESSURE))
    if smallest > target:
        most = math.floor(1000 * (1 - smallest / plain)) / 1000  # rounded down: the rate it names can be had
        why = ""
        if not removable(geometry.tokens, geometry.prefix_tokens):
            why = f" (nothing can merge: {geometry.tokens} tokens, {geometry.prefix_tokens} of them prefix tokens)"
        raise ScheduleError(
            f"merging can save at most {most:.3f} of this model's MACs{why}, asked for {1 - target / plain:.3f}"
        )
    low, high = 0.0, MAX_PRESSURE
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = geometry_macs(geometry, schedule_at(geometry, middle)) <= target
        low, high = (low, middle) if enough else (middle, high)
    return tuple(schedule_at(geometry, high))


def schedule_at(geometry: Geometry, pressure: float) -> list[int]:
    """Return the whole-token schedule of a pressure in [0, 3]; more pressure leaves no block more tokens.

    All schedules that are solved for a rate are of this family, whatever else is solved for takes it, too.

    Args:
        geometry: sizes of the backbone.
        pressure: 0 to 1: equal steps, from none to those that leave two patch tokens at the end. 1 to 2: the steps
            bend. 2 to 3: the last two patch tokens go as well, up to halving in every block.

    Example:
        >>> schedule_at(Geometry(6, 65, 1, 384, 384, 2 * 384 * 1536, 64), 0.5)
        [5, 5, 6, 5, 5, 5]
    """
    free = geometry.tokens - geometry.prefix_tokens
    if not removable(geometry.tokens, geometry.prefix_tokens):
        return [0] * geometry.depth
    strength = min(pressure, 1.0)
    bend = _MAX_BEND * min(max(pressure - 1, 0.0), 1.0)
    floor = 2 * min(3 - pressure, 1.0)
    # The scale for which the continuous trajectory N' = -scale * N ** bend ends at the floor, by bisection.
    low, high = 0.0, float(free)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _end(free, geometry.depth, bend, middle) > floor else (low, middle)
    scale = low * strength
    schedule, exact, tokens = [], float(free), geometry.tokens
    for block in range(1, geometry.depth + 1):
        exact = max(exact - scale * (exact / free) ** bend, floor)
        # Equal steps of, say, 5.5 tokens bring every other block to a half at once. Without the stagger all of them
        # would change their rounding together, and no schedule would lie between.
        removed = tokens - geometry.prefix_tokens - round(exact - _STAGGER * block**2)
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
    "MAX_PRESSURE",
    "PRESETS",
    "check_schedule",
    "preset_for",
    "preset_schedule",
    "schedule_at",
    "schedule_problems",
    "solve_schedule",
    "token_counts",
]
