"""The gate of FiberPO against a slow scalar reference, and every property it is said to have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from pyra.errors import ConfigError
from pyra.tasks.posttraining import FiberLevel, fiberpo_log_gate, fiberpo_regimes
from pyra.tasks.posttraining.fiberpo import (
    EMPTY,
    PASSES,
    ROLLS_BACK,
    ZEROED,
    group_problems,
    group_regimes,
    prompt_groups,
    roll_back,
)

BUDGETS: dict[str, Any] = {"c_plus": 0.15, "c_minus": 0.1, "eps": 0.02}


def reference(log_ratios: list[float], c_plus: float, c_minus: float, eps: float) -> list[float]:
    """The report's formulas for one trajectory, literally, with fifty digits."""
    mp.dps = 50
    count = len(log_ratios)
    values = [mpf(value) for value in log_ratios]
    s = {
        1: sum((max(value, mpf(0)) for value in values), mpf(0)) / count,
        -1: sum((max(-value, mpf(0)) for value in values), mpf(0)) / count,
    }

    def g(x: mpf, budget: mpf) -> mpf:
        sign = 1 if x >= 0 else -1
        if abs(x) <= budget:
            return x
        if abs(x) < (1 + mpf(1) / count) * budget:
            return sign * (count + 1) * budget - count * x
        return mpf(0)

    def clip(x: mpf) -> mpf:
        return min(max(x, -mpf(eps)), mpf(eps))

    found = []
    for value in values:
        sign = 1 if value >= 0 else -1
        u = sign * value - s[sign]
        v = -s[-sign]
        found.append(
            float(g(s[1], mpf(c_plus)) - g(s[-1], mpf(c_minus)) + clip(sign * u) - clip(sign * v)),
        )
    return found


def random_batch(scale: float, rows: int = 12, tokens: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_ratio = scale * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    log_ratio += scale * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    return log_ratio, torch.arange(tokens) < lengths[:, None]


@pytest.mark.parametrize("scale", [0.003, 0.03, 0.1, 0.15, 0.3, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_formulas_worked_out_slowly(scale: float, seed: int) -> None:
    log_ratio, mask = random_batch(scale, seed=seed)
    found = fiberpo_log_gate(log_ratio, mask, **BUDGETS)
    for row, real, values in zip(found, mask, log_ratio, strict=True):
        expected = reference(values[real].tolist(), **BUDGETS)
        torch.testing.assert_close(row[real], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
        assert not row[~real].any()


def test_the_random_batches_reach_every_regime() -> None:
    states = set()
    for scale in (0.003, 0.03, 0.1, 0.15, 0.3, 3.0):
        log_ratio, mask = random_batch(scale, rows=100)
        states |= set(fiberpo_regimes(log_ratio, mask, **BUDGETS).trajectories.tolist())
    assert states == {PASSES, ROLLS_BACK, ZEROED}


def jacobian(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """[N, N] of the tokens of all trajectories, one after the other."""
    full: Any = torch.autograd.functional.jacobian(lambda x: fiberpo_log_gate(x, mask, **BUDGETS), log_ratio)
    size = log_ratio.numel()
    return full.reshape(size, size)


def test_on_policy_the_gate_is_one_and_its_jacobian_the_identity() -> None:
    log_ratio, mask = torch.zeros(3, 5, dtype=torch.float64), torch.ones(3, 5)
    assert not fiberpo_log_gate(log_ratio, mask, **BUDGETS).any()
    torch.testing.assert_close(jacobian(log_ratio, mask), torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-15)


def test_one_token_at_rest_among_moved_ones_keeps_its_derivative() -> None:
    log_ratio = torch.tensor([[0.01, 0.0, -0.01, 0.0]], dtype=torch.float64)
    found = jacobian(log_ratio, torch.ones(1, 4))
    torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-15)


def test_is_the_ratio_while_nothing_saturates() -> None:
    log_ratio, mask = random_batch(0.004)
    assert not fiberpo_regimes(log_ratio, mask, **BUDGETS).clipped.any()
    found = fiberpo_log_gate(log_ratio, mask, **BUDGETS)
    torch.testing.assert_close(found[mask], log_ratio[mask], rtol=0, atol=1e-16)
    assert log_ratio[mask].abs().max() > 0.005


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.2])
def test_trajectories_do_not_know_of_each_other(scale: float) -> None:
    log_ratio, mask = random_batch(scale, rows=4, tokens=6)
    found = jacobian(log_ratio, mask).view(4, 6, 4, 6)
    assert found.any()
    for row in range(4):
        others = [other for other in range(4) if other != row]
        assert not found[row][:, others].any()
        alone = fiberpo_log_gate(log_ratio[row : row + 1], mask[row : row + 1], **BUDGETS)
        torch.testing.assert_close(fiberpo_log_gate(log_ratio, mask, **BUDGETS)[row : row + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_roll_back_is_continuous_with_slope_minus_t_and_then_nothing(count: int) -> None:
    budget, tokens = 0.15, torch.tensor(float(count), dtype=torch.float64)
    at, end = torch.tensor(budget, dtype=torch.float64), torch.tensor((1 + 1 / count) * budget, dtype=torch.float64)
    tiny = 1e-12
    assert roll_back(at, budget, tokens) == budget
    assert abs(roll_back(at + tiny, budget, tokens) - budget) < 2 * count * tiny
    assert abs(roll_back(end - tiny, budget, tokens)) < 2 * count * tiny
    assert roll_back(end + tiny, budget, tokens) == 0
    for place, slope in ((0.5 * budget, 1), ((1 + 0.5 / count) * budget, -count), ((1 + 2 / count) * budget, 0)):
        drift = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(roll_back(drift, budget, tokens), drift)[0] == pytest.approx(slope)


def test_a_drift_beyond_its_budget_pulls_every_token_back_by_its_share() -> None:
    drift = (1 + 0.5 / 8) * BUDGETS["c_plus"]
    log_ratio = torch.full((1, 8), drift, dtype=torch.float64)
    found = jacobian(log_ratio, torch.ones(1, 8))
    expected = torch.eye(8, dtype=torch.float64) - 1 / 8 - 1  # the residual, and slope -T of a mean over T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    beyond = jacobian(torch.full((1, 8), 1.0, dtype=torch.float64), torch.ones(1, 8))
    torch.testing.assert_close(beyond, torch.eye(8, dtype=torch.float64) - 1 / 8, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("drift", "advantage"), [(0.3, 1.0), (-0.3, -1.0)])
def test_a_uniform_drift_keeps_gradients_where_a_clipped_ratio_has_none(drift: float, advantage: float) -> None:
    log_ratio = torch.full((1, 6), drift, dtype=torch.float64, requires_grad=True)
    ratio = log_ratio.exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    assert not torch.autograd.grad(clipped, log_ratio)[0].any()
    log_gate = fiberpo_log_gate(log_ratio, torch.ones(1, 6), c_plus=0.5, c_minus=0.4, eps=0.02)
    (found,) = torch.autograd.grad((log_gate.exp() * advantage).sum(), log_ratio)
    expected = torch.full((1, 6), advantage, dtype=torch.float64) * ratio.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_padding_and_what_stands_in_it_change_nothing(scale: float) -> None:
    log_ratio, mask = random_batch(scale)
    padded = torch.cat([torch.full((12, 3), torch.nan), log_ratio, torch.full((12, 2), torch.inf)], 1)
    padded = padded.requires_grad_()
    wide = torch.nn.functional.pad(mask, (3, 2))
    found = fiberpo_log_gate(padded, wide.int(), **BUDGETS)
    torch.testing.assert_close(found[:, 3:-2], fiberpo_log_gate(log_ratio, mask, **BUDGETS), rtol=0, atol=1e-16)
    assert not found[~wide].any()
    (gradient,) = torch.autograd.grad(found.exp().sum(), padded)
    assert gradient.isfinite().all() and not gradient[~wide].any() and gradient[wide].any()


def test_order_of_tokens_does_not_matter() -> None:
    log_ratio, _ = random_batch(0.1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    found = fiberpo_log_gate(log_ratio, torch.ones(12, 9), **BUDGETS)
    moved = fiberpo_log_gate(log_ratio[:, order], torch.ones(12, 9), **BUDGETS)
    torch.testing.assert_close(found[:, order], moved, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(2, 4), (0, 4), (3, 0)])
def test_rows_without_a_token_are_one_and_have_finite_gradients(shape: tuple[int, int]) -> None:
    log_ratio = torch.full(shape, torch.nan, dtype=torch.float64, requires_grad=True)
    found = fiberpo_log_gate(log_ratio, torch.zeros(shape), **BUDGETS)
    assert found.shape == shape and not found.any()
    found.exp().sum().backward()
    assert log_ratio.grad is not None and not log_ratio.grad.any()
    assert fiberpo_regimes(log_ratio, torch.zeros(shape), **BUDGETS).trajectories.tolist() == [EMPTY] * shape[0]


def test_is_bounded_however_far_the_policy_moved() -> None:
    log_ratio, mask = random_batch(30.0)
    most = BUDGETS["c_plus"] + 2 * BUDGETS["eps"]
    assert fiberpo_log_gate(log_ratio, mask, **BUDGETS).abs().max() <= most


def test_half_precision_is_computed_in_float32() -> None:
    log_ratio, mask = random_batch(0.1)
    low = log_ratio.bfloat16()
    found = fiberpo_log_gate(low, mask, **BUDGETS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), fiberpo_log_gate(low.double(), mask, **BUDGETS), rtol=0, atol=1e-6)


def test_regimes_are_those_of_the_worse_sign() -> None:
    rolled = (1 + 0.5 / 4) * BUDGETS["c_minus"]
    rows = [[0.01] * 4, [-rolled] * 4, [-1.0] * 4, [0.1, -0.1, 0.1, -0.1], [0.9, -2 * rolled, 0, 0]]
    found = fiberpo_regimes(torch.tensor(rows, dtype=torch.float64), torch.ones(5, 4), **BUDGETS)
    assert found.trajectories.tolist() == [PASSES, ROLLS_BACK, ZEROED, PASSES, ZEROED]
    assert found.clipped.tolist() == [[False] * 4] * 3 + [[True] * 4] * 2


# levels above trajectories


def levels(*members: list[int], **changed: float) -> list[FiberLevel]:
    budgets = {"c_plus": 0.15, "c_minus": 0.1, "eps": 0.02, **changed}
    return [FiberLevel(torch.tensor(one), **budgets) for one in members]


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.2, 1.0])
def test_groups_of_one_trajectory_are_the_two_level_gate(scale: float) -> None:
    log_ratio, mask = random_batch(scale)
    alone = levels(list(range(12)), list(range(20, 32)))
    found = fiberpo_log_gate(log_ratio, mask, **BUDGETS, levels=alone)
    torch.testing.assert_close(found, fiberpo_log_gate(log_ratio, mask, **BUDGETS), rtol=0, atol=1e-15)


def test_a_group_holds_back_what_each_of_its_trajectories_may() -> None:
    log_ratio, mask = torch.full((4, 5), 0.12, dtype=torch.float64), torch.ones(4, 5)
    tight = levels([7, 7, 7, 3], c_plus=0.05, c_minus=0.04)
    found = fiberpo_log_gate(log_ratio, mask, **BUDGETS, levels=tight)
    torch.testing.assert_close(found, torch.zeros(4, 5, dtype=torch.float64), rtol=0, atol=1e-15)  # beyond (1 + 1/n) C
    assert fiberpo_log_gate(log_ratio, mask, **BUDGETS).min() > 0.119


def test_levels_couple_the_trajectories_of_a_group_and_no_others() -> None:
    log_ratio, mask = torch.full((4, 3), 0.06, dtype=torch.float64), torch.ones(4, 3)
    rolling = levels([0, 0, 0, 1], [5, 5, 5, 5], c_plus=0.055, c_minus=0.05)
    full: Any = torch.autograd.functional.jacobian(
        lambda x: fiberpo_log_gate(x, mask, **BUDGETS, levels=rolling[:1]), log_ratio
    )
    assert full[0, 0, 1].any() and not full[0, 0, 3].any() and not full[3, 0, 0].any()


def test_on_policy_levels_change_nothing() -> None:
    log_ratio, mask = torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3)
    mask[2] = 0
    above = levels([0, 0, 1, 1], [9, 9, 9, 9])
    full: Any = torch.autograd.functional.jacobian(
        lambda x: fiberpo_log_gate(x, mask, **BUDGETS, levels=above), log_ratio
    )
    torch.testing.assert_close(full.reshape(12, 12), torch.diag(mask.flatten()).double(), rtol=0, atol=1e-15)


def test_rows_without_a_token_are_no_members_of_a_group() -> None:
    log_ratio, mask = random_batch(0.05, rows=4)
    mask[1] = False
    found = fiberpo_log_gate(log_ratio, mask, **BUDGETS, levels=levels([0, 0, 0, 1]))
    left = [0, 2, 3]
    without = fiberpo_log_gate(log_ratio[left], mask[left], **BUDGETS, levels=levels([0, 0, 1]))
    torch.testing.assert_close(found[left], without, rtol=0, atol=1e-15)
    assert not found[1].any()


@pytest.mark.parametrize("members", [[2, 2, 0, 0, 5, 5, 7, 7, 9], [5, 0, 2, 9, 7, 0, 5, 7, 2]])
def test_regimes_of_groups(members: list[int]) -> None:
    """A group of its two answers each: within the budget, rolling back, beyond it, and without a token."""
    drifts = {0: (0.01, 0.02), 2: (0.06, 0.05), 5: (-0.09, -0.09), 7: (0.14, 0.0), 9: (0.1,)}
    left = {number: list(values) for number, values in drifts.items()}
    rows = [left[number].pop(0) for number in members]
    log_ratio = torch.tensor(rows, dtype=torch.float64)[:, None].expand(9, 4)
    mask = torch.ones(9, 4)
    mask[members.index(9)] = 0
    (level,) = levels(members, c_plus=0.05, c_minus=0.04)
    found = group_regimes(log_ratio, mask, level, c_plus=0.15, c_minus=0.1)
    assert found.groups.tolist() == [PASSES, ROLLS_BACK, ZEROED, ROLLS_BACK, EMPTY]
    assert found.clipped.tolist() == [number == 7 for number in members]  # 0.07 beside the mean


@pytest.mark.parametrize("seed", range(4))
def test_prompts_of_the_same_tokens_are_one_group_wherever_their_padding_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = [[5, 6, 7], [5, 6], [6, 7], [7, 6, 5], [0], [0, 0], [5, 6, 7, 0]]  # 0 is what is padded with, too
    drawn = torch.randint(0, len(kinds), (20,), generator=generator).tolist()
    width = 8
    ids, mask = torch.zeros(20, width, dtype=torch.long), torch.zeros(20, width, dtype=torch.long)
    for row, kind in enumerate(drawn):
        prompt = kinds[kind]
        start = int(torch.randint(0, width - len(prompt) + 1, (1,), generator=generator))
        ids[row] = int(torch.randint(0, 9, (1,), generator=generator))  # what stands in the padding does not matter
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    found = prompt_groups(ids, mask)
    assert found.shape == (20,) and len(found.unique()) == len(set(drawn)) > 3
    same = torch.tensor(drawn)[:, None] == torch.tensor(drawn)
    assert torch.equal(found[:, None] == found, same)


# what cannot be used


@pytest.mark.parametrize(
    ("budgets", "told"),
    [
        ((None, None, None), []),
        ((0.1, 0.05, 0.01), []),
        ((None, 0.1, 0.1), ["a, b and c are given together or not at all: a is missing"]),
        ((0.1, None, None), ["a, b and c are given together or not at all: b and c are missing"]),
        ((0.1, 0.1, 0.01), ["b must be below a, got 0.1 and 0.1"]),
        ((0.1, 0.05, 0.0), ["c must be a number above 0, got 0.0"]),
        ((0.15, 0.05, 0.01), ["a must be below that of an answer, 0.15, got 0.15: no group drifts further than its"]),
        ((0.14, 0.12, 0.01), ["b must be below that of an answer, 0.1, got 0.12: no group drifts further than its"]),
    ],
)
def test_budgets_of_groups_that_make_no_sense_are_named(budgets: Any, told: list[str]) -> None:
    found = group_problems(budgets, (0.15, 0.1), ("a", "b", "c"))
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"c_plus": 0.05}, "c_minus must be below c_plus, got 0.1 and 0.05"),
        ({"c_minus": 0}, "c_minus must be a number above 0, got 0"),
        ({"c_minus": float("nan")}, "c_minus must be a number above 0"),
        ({"c_plus": float("inf")}, "c_plus must be a number above 0"),
        ({"eps": -0.1}, "eps must be a number above 0, got -0.1"),
        ({"eps": 0.2}, "eps must be much smaller than c_plus + c_minus"),
        ({"eps": True}, "eps must be a number above 0"),
    ],
)
def test_budgets_that_make_no_sense_are_named(changed: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fiberpo_log_gate(torch.zeros(1, 2), torch.ones(1, 2), **{**BUDGETS, **changed})
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_all_that_is_wrong_with_tensors_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"log_ratio must be floating-point \[B, T\].*; mask must have the shape"):
        fiberpo_log_gate(torch.zeros(3, dtype=torch.long), torch.ones(1, 3), **BUDGETS)


@pytest.mark.parametrize("given", [([[0.0, 0.1]], torch.ones(1, 2)), (torch.zeros(1, 2), [[1, 1]])])
def test_lists_are_no_tensors(given: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"log_ratio and mask must be tensors; eps must be a number above 0, got 0$"):
        fiberpo_log_gate(*given, **{**BUDGETS, "eps": 0}, levels=[FiberLevel(torch.zeros(1).long(), 0.1, 0.05, 0.02)])


def test_budgets_may_be_numbers_of_numpy() -> None:
    moved = torch.tensor([[0.3, -0.2, 0.4]], dtype=torch.float64)
    budgets = {name: np.float64(value) for name, value in BUDGETS.items()}
    expected = fiberpo_log_gate(moved, torch.ones(1, 3), **BUDGETS)
    assert torch.equal(fiberpo_log_gate(moved, torch.ones(1, 3), **budgets), expected)


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_on_the_mask_shows_in_its_trajectory_alone(wrong: float) -> None:
    moved = torch.tensor([[wrong, 0.01, 0.02], [0.01, 0.02, 0.03]])
    found = fiberpo_log_gate(moved, torch.ones(2, 3), **BUDGETS)
    assert found[0].isnan().any()
    assert torch.equal(found[1], fiberpo_log_gate(moved[1:], torch.ones(1, 3), **BUDGETS)[0])


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([[0, 0, 1]], "level 0: members must be whole numbers"),
        ([[0, 0], [0, 1]], "level 1 splits a group of level 0"),
    ],
)
def test_levels_that_do_not_fit_are_named(members: list[list[int]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fiberpo_log_gate(torch.zeros(2, 2), torch.ones(2, 2), **BUDGETS, levels=levels(*members))


def test_the_gate_is_imported_without_trl() -> None:
    script = (
        "import sys\nfrom pyra.tasks.posttraining import fiberpo_log_gate, FiberLevel\n"
        "print([name for name in ('trl', 'transformers', 'datasets', 'math_verify') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("length", "beyond", "expected"), [(100_000, 0.5, 0.075), (4096, 1.0, 0.0), (300_000, 1.01, 0.0)]
)
def test_the_roll_back_of_long_answers_is_as_steep_in_float32(length: int, beyond: float, expected: float) -> None:
    log_ratio = torch.full((1, length), 0.15 * (1 + beyond / length), dtype=torch.float64)
    found = fiberpo_log_gate(log_ratio.float(), torch.ones(1, length), c_plus=0.15, c_minus=0.1, eps=0.05)
    assert found[0, 0].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("members", [[0, 0], torch.zeros(2, dtype=torch.complex64), torch.zeros(3, dtype=torch.long)])
def test_members_that_are_no_numbers_of_groups_are_named(members: Any) -> None:
    level = FiberLevel(members, 0.1, 0.05, 0.02)
    with pytest.raises(ConfigError, match="level 0: members must be"):
        fiberpo_log_gate(torch.zeros(2, 3), torch.ones(2, 3), **BUDGETS, levels=[level])
