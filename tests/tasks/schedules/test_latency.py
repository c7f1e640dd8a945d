"""Schedules for a latency: least merging within the target, one correction, and what cannot be reached."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from pyra import PyraConfig
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ScheduleError
from pyra.schedule import check_schedule, solve_schedule
from pyra.tasks.schedules import latency
from pyra.tasks.schedules.costs import CountedCosts, LayerTimes, MeasuredCosts, measure_costs, total
from pyra.tasks.schedules.latency import Check, LatencyTarget, latency_schedule, schedule_within

VIT_B = Geometry(12, 197, 1, 768, 768, 2 * 768 * 3072, 64, 196 * 768 * 768)
CONFIG = PyraConfig(rate=0.5)


def costs_of(matching: float = 0.0) -> MeasuredCosts:
    """A millisecond a layer and token share; removing anything costs ``matching`` of that."""
    tokens = (3, 197)
    triples = tuple((n / 197, n / 197 + matching, 0.8 * n / 197 + matching) for n in tokens)
    times = LayerTimes(tuple(range(12)), tokens, triples, triples[-1])
    return MeasuredCosts(VIT_B, 0.5, (times,), 1, 1.0)


def test_with_counted_costs_it_is_the_rate_solver() -> None:
    costs = CountedCosts(VIT_B)
    for rate in (0.0, 0.2, 0.5, 0.7):
        assert schedule_within(costs, geometry_macs(VIT_B) * (1 - rate)) == solve_schedule(VIT_B, rate=rate)


def test_the_least_merging_that_meets_it() -> None:
    costs = costs_of(matching=0.05)
    schedules = [schedule_within(costs, costs.plain / speedup) for speedup in (1.0, 1.2, 2.0, 3.0)]
    assert schedules[0] == [0] * 12
    for speedup, schedule in zip((1.0, 1.2, 2.0, 3.0), schedules, strict=True):
        check_schedule(schedule, VIT_B)
        assert costs.plain / speedup * 0.99 <= total(costs, schedule) <= costs.plain / speedup
    assert all(geometry_macs(VIT_B, more) < geometry_macs(VIT_B, less) for less, more in pairwise(schedules))


def checks_in_a_row(monkeypatch: pytest.MonkeyPatch, slower: float) -> list[list[int]]:
    """Let a check find the merged model ``slower`` times as slow as predicted, and keep what was checked."""
    seen: list[list[int]] = []

    def check(model, images, schedule, config, costs, rounds):
        seen.append(schedule)
        predicted = total(costs, schedule)
        return Check(schedule, predicted, costs.plain / predicted, slower * predicted, costs.plain)

    monkeypatch.setattr(latency, "check", check)
    return seen


@pytest.mark.parametrize("target", [LatencyTarget(speedup=2.0), LatencyTarget(seconds=costs_of().plain / 2)])
@pytest.mark.parametrize("slower", [1.15, 0.9])
def test_a_prediction_that_is_off_is_corrected_once(
    monkeypatch: pytest.MonkeyPatch, target: LatencyTarget, slower: float
) -> None:
    seen, costs = checks_in_a_row(monkeypatch, slower), costs_of()
    found = latency_schedule(nn.Identity(), torch.zeros(1), target, CONFIG, costs=costs)
    assert len(seen) == 2 and found.schedule == seen[1]
    assert (sum(seen[1]) > sum(seen[0])) is (slower > 1)
    assert found.met and found.chosen.excess(target) == pytest.approx(1, abs=0.02)


def test_a_prediction_that_holds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = checks_in_a_row(monkeypatch, 1.01)
    found = latency_schedule(nn.Identity(), torch.zeros(1), LatencyTarget(speedup=2), CONFIG, costs=costs_of())
    assert len(seen) == 1 and found.checks == [found.chosen]


def test_a_target_out_of_reach_names_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_in_a_row(monkeypatch, 1.2)
    costs = costs_of()
    with pytest.raises(ScheduleError, match=r"to .* ms at best on this device .*, asked for 1 ms") as far:
        latency_schedule(nn.Identity(), torch.zeros(1), LatencyTarget(seconds=0.001), CONFIG, costs=costs)
    best = float(str(far.value).split("speed-up of ")[1].split(")")[0])
    assert "\n" not in str(far.value)
    # What the layers' costs allow, the whole model may not: the correction says so with its own best.
    with pytest.raises(ScheduleError, match=f"a speed-up of {best / 1.2:.1f}"):
        latency_schedule(nn.Identity(), torch.zeros(1), LatencyTarget(speedup=best * 0.99), CONFIG, costs=costs)


@pytest.mark.parametrize("wrong", [{}, {"seconds": 1.0, "speedup": 2.0}, {"seconds": 0.0}, {"speedup": float("nan")}])
def test_targets(wrong: dict[str, float]) -> None:
    with pytest.raises(ScheduleError, match="a positive number"):
        LatencyTarget(**wrong)


def test_a_real_model_is_timed() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=192, depth=3, num_heads=3, num_classes=4
    ).eval()
    images = torch.randn(4, 3, 64, 64)
    expected = model(images)
    costs = measure_costs(model, images, CONFIG, rounds=3)
    found = latency_schedule(model, images, LatencyTarget(speedup=1.15), CONFIG, costs=costs, rounds=3)
    check_schedule(found.schedule, costs.geometry)
    assert any(found.schedule)
    assert found.chosen.measured > 0 and found.chosen.plain > 0
    assert torch.equal(model(images), expected)
