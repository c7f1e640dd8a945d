"""Schedules: the published presets, and the solver's promises over rates and geometries."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyra.cost import Geometry, geometry_macs
from pyra.errors import ScheduleError
from pyra.matching import removable
from pyra.schedule import PRESETS, check_schedule, preset_schedule, schedule_problems, solve_schedule

bounded = settings(deadline=None, max_examples=60)
VIT_B = Geometry(12, 197, 1, 768, 768, 2 * 768 * 3072, 64, 196 * 768 * 768)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    prefix = draw(st.integers(0, 5))
    dim = 32 * draw(st.integers(1, 24))
    return Geometry(
        depth=draw(st.integers(1, 24)),
        tokens=prefix + draw(st.integers(1, 400)),
        prefix_tokens=prefix,
        dim=dim,
        attention_dim=dim * draw(st.integers(1, 2)),
        mlp_macs=2 * dim * dim * draw(st.integers(1, 4)),
        head_dim=32,
        embedding_macs=draw(st.sampled_from([0, dim * dim])),
    )


def most(geometry: Geometry) -> float:
    """Largest rate the solver reaches, read off its own error."""
    with pytest.raises(ScheduleError, match="at most") as caught:
        solve_schedule(geometry, macs=1)
    return float(str(caught.value).split("at most ")[1].split()[0]) - 5e-4  # it is rounded to three digits


@bounded
@given(geometries(), st.floats(0, 1))
def test_reaches_the_rate_within_one_token(geometry: Geometry, share: float) -> None:
    rate = share * most(geometry)
    assume(rate >= 0)
    schedule = solve_schedule(geometry, rate=rate)
    assert schedule_problems(schedule, geometry) == []
    plain, left = geometry_macs(geometry), geometry_macs(geometry, schedule)
    assert left <= plain * (1 - rate)
    # One token more on the way through all blocks costs this; no step of the solver is coarser.
    token = geometry_macs(replace(geometry, tokens=geometry.tokens + 1), schedule) - left
    assert left + token > plain * (1 - rate)


@bounded
@given(geometries(), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_rate_never_costs_more(geometry: Geometry, one: float, other: float) -> None:
    limit = most(geometry)
    assume(limit > 0)
    low, high = (solve_schedule(geometry, rate=share * limit) for share in sorted([one, other]))
    assert geometry_macs(geometry, high) <= geometry_macs(geometry, low)
    assert sum(high) >= sum(low)


@bounded
@given(geometries(), st.floats(0, 1))
def test_macs_and_rate_agree(geometry: Geometry, share: float) -> None:
    limit = most(geometry)
    assume(limit > 0)
    target = round(geometry_macs(geometry) * (1 - share * limit))
    assume(target < geometry_macs(geometry))
    schedule = solve_schedule(geometry, macs=target)
    assert geometry_macs(geometry, schedule) <= target
    assert schedule == solve_schedule(geometry, rate=1 - (target + 0.25) / geometry_macs(geometry))


@bounded
@given(geometries())
def test_nothing_to_save(geometry: Geometry) -> None:
    zeros = [0] * geometry.depth
    assert solve_schedule(geometry, rate=0) == zeros
    assert solve_schedule(geometry, rate=0.0) == zeros
    assert solve_schedule(geometry, macs=geometry_macs(geometry)) == zeros
    assert solve_schedule(geometry, macs=10 * geometry_macs(geometry)) == zeros


def test_half_the_macs_of_vit_b_is_the_published_schedule() -> None:
    assert tuple(solve_schedule(VIT_B, rate=0.5)) == PRESETS["vit_base_patch16_224"]["low"]


def test_the_published_high_rate_bends_like_the_published_schedule() -> None:
    published = preset_schedule("vit_base_patch16_224", "high")
    schedule = solve_schedule(VIT_B, macs=geometry_macs(VIT_B, published))
    assert schedule == sorted(schedule, reverse=True) and schedule[0] > 2 * schedule[6]
    assert max(abs(own - theirs) for own, theirs in zip(schedule, published, strict=True)) <= 4


@pytest.mark.parametrize("depth", [1, 12])
def test_a_model_of_one_patch(depth: int) -> None:
    geometry = replace(VIT_B, depth=depth, tokens=2)
    assert solve_schedule(geometry, rate=0.0) == [0] * depth
    with pytest.raises(ScheduleError, match=r"at most 0\.000 .* asked for 0\.100"):
        solve_schedule(geometry, rate=0.1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one of rate and macs"),
        ({"rate": 0.5, "macs": 5}, "exactly one of rate and macs"),
        ({"rate": 1}, r"rate must be a number in \[0, 1\), got 1"),
        ({"rate": -0.1}, r"rate must be a number in \[0, 1\), got -0\.1"),
        ({"rate": float("nan")}, r"rate must be a number in \[0, 1\), got nan"),
        ({"macs": 0}, "macs must be a positive number, got 0"),
        ({"macs": -3}, "macs must be a positive number, got -3"),
        ({"rate": 0.99}, r"merging can save at most 0\.\d+ of this model's MACs, asked for 0\.990"),
        ({"macs": 1}, r"merging can save at most 0\.\d+ of this model's MACs, asked for 1\.000"),
    ],
)
def test_impossible_targets(target: dict[str, float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        solve_schedule(VIT_B, **target)


@pytest.mark.parametrize("level", ["low", "high"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_fresh_lists(name: str, level: str) -> None:
    first = preset_schedule(name, level)
    first.clear()
    assert preset_schedule(f"{name}.some_tag", level) == list(PRESETS[name][level])


def test_unknown_presets() -> None:
    with pytest.raises(ScheduleError, match=r"no published schedule for 'vit_bas_patch16_224' \(did you mean 'vit_"):
        preset_schedule("vit_bas_patch16_224", "low")
    with pytest.raises(ScheduleError, match="unknown level 'middle'; vit_base_patch16_224 has low, high"):
        preset_schedule("vit_base_patch16_224", "middle")


def test_all_problems_at_once() -> None:
    geometry = replace(VIT_B, depth=5, tokens=17)
    problems = schedule_problems([-1, 9, 3, 4], geometry)
    assert problems == [
        "it has 4 entries, the model has 5 blocks",
        "block 0 removes -1: negative",
        "block 1 removes 9 of 17 tokens: at most 8 can go",
        "block 3 removes 4 of 6 tokens: at most 2 can go",
    ]
    with pytest.raises(ScheduleError) as caught:
        check_schedule([-1, 9, 3, 4], geometry)
    assert str(caught.value) == "the schedule [-1, 9, 3, 4] does not fit: " + "; ".join(problems)


@bounded
@given(geometries(), st.data())
def test_no_problem_means_matching_never_clips(geometry: Geometry, data: st.DataObject) -> None:
    schedule, tokens, fits = [], geometry.tokens, True
    for _ in range(geometry.depth):
        schedule.append(data.draw(st.integers(0, 1 + removable(tokens, geometry.prefix_tokens))))
        fits &= schedule[-1] <= removable(tokens, geometry.prefix_tokens)
        tokens -= min(schedule[-1], removable(tokens, geometry.prefix_tokens))
    assert (schedule_problems(schedule, geometry) == []) == fits
