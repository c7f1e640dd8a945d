"""FiberPO's gate: how far a token's probability may move, for its trajectory as a whole and beside the others in it.

The two-level objective of the JoyAI-LLM Flash report (arXiv 2604.03044, section 3.3.1; FiberPO: arXiv 2603.08239). With
``r`` the ratio of new to old probability of a token, both signs of ``log r`` are treated alike and apart from each
other: of each, the mean over the trajectory (its drift) has a budget ``C`` and rolls back to nothing beyond it, and
what a token moves beside that mean is clipped at ``eps``:

    log G = g(log s+, C+, T) - g(log s-, C-, T) + clip(l u, eps) - clip(l v, eps)

Written by sign, with ``p+ = max(log r, 0)``, ``p- = max(-log r, 0)`` and ``log s`` their means over the trajectory:

    log G = [g(log s+, C+, T) + clip(p+ - log s+, eps)] - [g(log s-, C-, T) + clip(p- - log s-, eps)]

which is the same for either sign ``l`` of ``log r``, and has no kink where ``log r`` is 0: there, on policy, the two
forms' derivatives add up to exactly 1.

:class:`FiberLevel` puts prompt groups and domains above trajectories. That is an extension of ours: the paper has a
hierarchy of its own, FiberPO-Domain, whose formulas may differ.

Letters: ``B`` trajectories, ``T`` tokens of one, ``M`` members of groups, ``P`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from pyra.errors import ConfigError

C_PLUS, C_MINUS, EPS, UPDATES = 0.15, 0.1, 0.05, 4
"""Budgets, and updates on each rollout, where none are given: ours, as the published values are not known."""
PASSES, ROLLS_BACK, ZEROED, EMPTY = 0, 1, 2, 3
"""What becomes of a trajectory's drift; ``EMPTY`` has no token."""
GroupBudgets = tuple[float | None, float | None, float | None]
"""``c_plus``, ``c_minus`` and ``eps`` of prompt groups, or nothing."""


@dataclass(frozen=True)
class FiberLevel:
    """A level above trajectories: prompt groups, then domains (an extension of ours, not the paper's FiberPO-Domain).

    A level does to the gated drifts below it what a trajectory does to its tokens: their mean has a budget and rolls
    back beyond it, with the number of members in place of ``T``; what a member moves beside it is clipped.

    Attributes:
        members: [B] whole numbers; trajectories of one number are one group, which lies in one group of every wider
            level.
        c_plus: budget of the mean upward drift.
        c_minus: budget of the mean downward drift, below ``c_plus``.
        eps: how far a member may be from the mean.
    """

    members: Tensor
    c_plus: float
    c_minus: float
    eps: float


@dataclass(frozen=True)
class Regimes:
    """What the gate does to a batch.

    Attributes:
        trajectories: [B] ``PASSES``, ``ROLLS_BACK``, ``ZEROED`` or ``EMPTY``: the worse of its two signs.
        clipped: [B, T] tokens that have moved beside their trajectory by more than ``eps``.
    """

    trajectories: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class GroupRegimes:
    """What a level above trajectories does to a batch.

    Attributes:
        groups: [P] ``PASSES``, ``ROLLS_BACK``, ``ZEROED`` or ``EMPTY``: the worse of its two signs; in the order of
            their numbers.
        clipped: [B] trajectories whose gated drift is beside their group's by more than ``eps``.
    """

    groups: Tensor
    clipped: Tensor


def fiberpo_log_gate(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    c_plus: float,
    c_minus: float,
    eps: float,
    levels: Sequence[FiberLevel] = (),
) -> Tensor:
    """Return log G of every token; the objective is the mean over trajectories of the mean over tokens of G A.

    G is 1 with the identity as the Jacobian of its logarithm where nothing has moved, equals ``r`` while no budget is
    used up, and is at most ``exp(c_plus + 2 eps)``. Trajectories do not know of each other (without ``levels``).

    Args:
        log_ratio: [B, T] log of new over old probability of each token; anything, NaN included, off the mask. Finite on
            it: otherwise log G of that trajectory holds NaN, which its gradient need not.
        mask: [B, T] 1 (true) on the tokens that count.
        c_plus: budget of a trajectory's mean upward drift, in nats a token.
        c_minus: budget of its mean downward drift, below ``c_plus``.
        eps: how far a token may move beside its trajectory; much smaller than ``c_plus + c_minus``.
        levels: groups of trajectories, from narrow to wide (an extension).

    Returns:
        [B, T], float32 at least; 0 off the mask.

    Raises:
        ConfigError: naming every shape, type and budget that cannot be used.

    >>> zero = torch.zeros(1, 3)
    >>> fiberpo_log_gate(zero, torch.ones(1, 3), c_plus=0.15, c_minus=0.1, eps=0.02)
    tensor([[0., 0., 0.]])
    """
    problems = budget_problems(c_plus, c_minus, eps)
    if isinstance(log_ratio, Tensor) and isinstance(mask, Tensor):
        problems = _tensor_problems(log_ratio, mask) + problems
        problems += [problem for place, level in enumerate(levels) for problem in _level_problems(place, levels, mask)]
    else:
        problems = ["log_ratio and mask must be tensors", *problems]
    if problems:
        raise ConfigError(f"fiberpo: {'; '.join(problems)}")
    real, rising, falling = _parts(log_ratio, mask)
    up = _one_sign(rising, real, c_plus, eps, [(level.members, level.c_plus, level.eps) for level in levels])
    down = _one_sign(falling, real, c_minus, eps, [(level.members, level.c_minus, level.eps) for level in levels])
    return torch.where(real, up - down, 0.0)


def roll_back(drift: Tensor, budget: float, count: Tensor) -> Tensor:
    """Return g(drift, C, T): what is within the budget, back to 0 with slope -T beyond it, and 0 from (1 + 1/T) C on.

    Args:
        drift: of any shape, at least 0.
        budget: C.
        count: T, at least 1, of the same shape.
    """
    count = count.to(drift.dtype)  # a whole number times a float would be rounded to float32
    falling = budget - count * (drift - budget)  # (T + 1) C - T drift, without the difference of two large numbers
    return torch.where(drift <= budget, drift, torch.where(drift < (1 + 1 / count) * budget, falling, 0.0))


@torch.no_grad()
def fiberpo_regimes(log_ratio: Tensor, mask: Tensor, *, c_plus: float, c_minus: float, eps: float) -> Regimes:
    """Tell which trajectories pass, roll back or are zeroed, and which tokens are clipped; arguments as of the gate."""
    real, rising, falling = _parts(log_ratio, mask)
    count = real.sum(1).clamp(min=1)
    states, clipped = [], torch.zeros_like(real)
    for parts, budget in ((rising, c_plus), (falling, c_minus)):
        drift = parts.sum(1, dtype=_wide(parts)) / count
        states.append(_states(drift, budget, count))
        clipped |= ((parts - drift.to(parts.dtype)[:, None]).abs() > eps) & real
    return Regimes(torch.where(real.any(1), torch.maximum(*states), EMPTY), clipped)


@torch.no_grad()
def group_regimes(log_ratio: Tensor, mask: Tensor, level: FiberLevel, *, c_plus: float, c_minus: float) -> GroupRegimes:
    """Tell which groups of a level right above trajectories pass, roll back or are zeroed, and what is clipped there.

    Args:
        log_ratio: [B, T], as of :func:`fiberpo_log_gate`.
        mask: [B, T].
        level: the groups.
        c_plus: budget of a trajectory.
        c_minus: budget of a trajectory.
    """
    real, rising, falling = _parts(log_ratio, mask)
    divisor, present = real.sum(1).clamp(min=1), real.any(1)
    states, clipped = [], torch.zeros_like(present)
    for parts, budget, of_group in ((rising, c_plus, level.c_plus), (falling, c_minus, level.c_minus)):
        values = roll_back(parts.sum(1, dtype=_wide(parts)) / divisor, budget, divisor)
        own, count, drift = _group_means(values, present, level.members)
        states.append(_states(drift, of_group, count.clamp(min=1)))
        clipped |= ((values - drift[own]).abs() > level.eps) & present
    return GroupRegimes(torch.where(count > 0, torch.maximum(*states), EMPTY), clipped)


def prompt_groups(ids: Tensor, mask: Tensor) -> Tensor:
    """Return a number for each prompt, the same for prompts of the same tokens: members of a :class:`FiberLevel`.

    Args:
        ids: [B, N] tokens of the prompts; anything off the mask, on whichever side.
        mask: [B, N] 1 (true) on the prompt.

    Returns:
        [B], from 0.

    >>> prompt_groups(torch.tensor([[0, 5], [7, 5], [9, 5]]), torch.tensor([[0, 1], [1, 1], [0, 1]]))
    tensor([0, 1, 0])
    """
    real = mask.bool()
    front = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # the prompt first, in its order
    tokens = torch.where(real, ids, -1).gather(1, front)
    return tokens.unique(dim=0, return_inverse=True)[1]


def budget_problems(c_plus: float, c_minus: float, eps: float, names: Sequence[str] = ()) -> list[str]:
    """List what is wrong with budgets, under the names that they are given by.

    >>> budget_problems(0.1, 0.2, 0.01)
    ['c_minus must be below c_plus, got 0.2 and 0.1']
    """
    plus, minus, clip = names or ("c_plus", "c_minus", "eps")
    values = {plus: c_plus, minus: c_minus, clip: eps}
    wrong = [name for name, value in values.items() if not _positive(value)]
    if wrong:
        return [f"{name} must be a number above 0, got {values[name]!r}" for name in wrong]
    problems = []
    if c_minus >= c_plus:
        problems.append(f"{minus} must be below {plus}, got {c_minus} and {c_plus}")
    if eps > (c_plus + c_minus) / 2:
        problems.append(f"{clip} must be much smaller than {plus} + {minus} (half of it at most), got {eps}")
    return problems


def group_problems(budgets: GroupBudgets, of_trajectories: tuple[float, float], names: Sequence[str]) -> list[str]:
    """List what is wrong with the budgets of prompt groups, under the names that they are given by.

    Args:
        budgets: ``c_plus``, ``c_minus`` and ``eps`` of the level; all None for no such level.
        of_trajectories: ``c_plus`` and ``c_minus``.
        names: of the three.

    >>> group_problems((0.1, None, None), (0.15, 0.1), ("c_plus", "c_minus", "eps"))
    ['c_plus, c_minus and eps are given together or not at all: c_minus and eps are missing']
    """
    missing = [name for name, value in zip(names, budgets, strict=True) if value is None]
    if len(missing) == len(names):
        return []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        plus, minus, clip = names
        return [f"{plus}, {minus} and {clip} are given together or not at all: {' and '.join(missing)} {verb} missing"]
    problems = budget_problems(*budgets, names)  # type: ignore[arg-type]
    if problems:
        return problems
    return [
        f"{name} must be below that of an answer, {outer}, got {value}: no group drifts further than its answers"
        for name, value, outer in zip(names[:2], budgets[:2], of_trajectories, strict=True)
        if value is not None and _positive(outer) and value >= outer
    ]


def _states(drift: Tensor, budget: float, count: Tensor) -> Tensor:
    return (drift > budget).long() + (drift >= (1 + 1 / count.to(drift.dtype)) * budget).long()


def _parts(log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mask as bool, and p+ and p- with 0 off the mask."""
    real = mask.bool()
    if log_ratio.dtype in (torch.float16, torch.bfloat16):
        log_ratio = log_ratio.float()
    moved = torch.where(real, log_ratio, 0.0)
    rising = moved.clamp(min=0)
    return real, rising, rising - moved  # a second clamp would have a derivative of its own at 0


_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Wider = list[tuple[Tensor, float, float]]


def _one_sign(parts: Tensor, real: Tensor, budget: float, eps: float, levels: _Wider) -> Tensor:
    """Gate the parts [B, T] of one sign."""
    count = real.sum(1)
    divisor = count.clamp(min=1)
    drift = parts.sum(1, dtype=_wide(parts)) / divisor  # of a long answer the slope of the roll-back is steep
    residual = (parts - drift.to(parts.dtype)[:, None]).clamp(-eps, eps)
    gated = _gated_groups(roll_back(drift, budget, divisor), count > 0, levels)
    return gated.to(parts.dtype)[:, None] + residual


def _wide(parts: Tensor) -> torch.dtype:
    """Return float64, where the device has it."""
    return parts.dtype if parts.device.type == "mps" else torch.float64


def _gated_groups(values: Tensor, present: Tensor, levels: _Wider) -> Tensor:
    """Gate values [M] of one sign by the groups that they are in; members that are not present do not count."""
    if not levels:
        return values
    (members, budget, eps), *wider = levels
    own, count, drift = _group_means(values, present, members)
    residual = (values - drift[own]).clamp(-eps, eps)
    of_groups = [(outer.new_empty(len(count)).scatter(0, own.to(outer.device), outer), *rest) for outer, *rest in wider]
    rolled = roll_back(drift, budget, count.clamp(min=1))
    return _gated_groups(rolled, count > 0, of_groups)[own] + residual  # type: ignore[arg-type]


def _group_means(values: Tensor, present: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the place of each member's group [M], and the groups' members that are present and means [P]."""
    groups, own = members.to(values.device).unique(return_inverse=True)
    zero = values.new_zeros(len(groups))
    count = zero.index_add(0, own, present.to(values.dtype))
    return own, count, zero.index_add(0, own, torch.where(present, values, 0.0)) / count.clamp(min=1)


def _tensor_problems(log_ratio: Tensor, mask: Tensor) -> list[str]:
    problems = []
    if log_ratio.ndim != 2 or log_ratio.dtype not in _TYPES:
        problems.append(f"log_ratio must be floating-point [B, T], got {log_ratio.dtype} {list(log_ratio.shape)}")
    if mask.shape != log_ratio.shape:
        problems.append(f"mask must have the shape of log_ratio, {list(log_ratio.shape)}, got {list(mask.shape)}")
    return problems


def _level_problems(place: int, levels: Sequence[FiberLevel], mask: Tensor) -> list[str]:
    level = levels[place]
    names = [f"level {place}: {name}" for name in ("c_plus", "c_minus", "eps")]
    problems = budget_problems(level.c_plus, level.c_minus, level.eps, names)
    members = level.members
    if not isinstance(members, Tensor) or members.is_floating_point() or members.is_complex():
        return [*problems, f"level {place}: members must be a tensor of whole numbers [B]"]
    if members.shape != mask.shape[:1]:
        return [*problems, f"level {place}: members must be whole numbers [B], got {list(members.shape)}"]
    if place and getattr(levels[place - 1].members, "shape", None) == members.shape:
        narrow = levels[place - 1].members
        pairs = torch.stack((narrow, members)).unique(dim=1)
        if pairs.shape[1] > len(narrow.unique()):
            problems.append(f"level {place} splits a group of level {place - 1}: give levels from narrow to wide")
    return problems


def _positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
