"""Schedules: the published presets, and the solver's promises over rates and geometries."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyra.cost import Geometry, geometry_macs
from pyra.errors import ScheduleError
from pyra.matching import removable
from pyra.schedule import PRESETS, check_schedule, preset_for, preset_schedule, schedule_problems, solve_schedule

bounded = settings(deadline=None, max_examples=60)
VIT_B = Geometry(12, 197, 1, 768, 768, 2 * 768 * 3072, 64, 196 * 768 * 768)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    prefix = draw(st.integers(0, 5))
    dim = 32 * draw(st.integers(1, 24))
    return Geometry(
        depth=draw(st.integers(1, 48)),
        tokens=prefix + draw(st.one_of(st.integers(1, 20), st.integers(1, 1500))),
        prefix_tokens=prefix,
        dim=dim,
        attention_dim=dim * draw(st.integers(1, 2)),
        mlp_macs=2 * dim * dim * draw(st.integers(1, 4)),
        head_dim=32,
        embedding_macs=draw(st.sampled_from([0, dim * dim])),
    )


def plain_vit(depth: int, tokens: int, prefix: int, dim: int = 768, patch: int = 16) -> Geometry:
    """A transformer with an MLP of ratio 4 over square patches of three colours."""
    return Geometry(depth, tokens, prefix, dim, dim, 8 * dim**2, 64, (tokens - prefix) * dim * 3 * patch**2)


def saved(geometry: Geometry, schedule: list[int]) -> float:
    return 1 - geometry_macs(geometry, schedule) / geometry_macs(geometry)


def halving(geometry: Geometry) -> list[int]:
    """The strongest schedule there is: no block can have fewer tokens than this leaves it."""
    schedule, tokens = [], geometry.tokens
    for _ in range(geometry.depth):
        schedule.append(removable(tokens, geometry.prefix_tokens))
        tokens -= schedule[-1]
    return schedule


def halved_blocks(geometry: Geometry, schedule: list[int]) -> int:
    """Blocks that remove as much as they can."""
    tokens, count = geometry.tokens, 0
    for removed in schedule:
        count += 0 < removed == removable(tokens, geometry.prefix_tokens)
        tokens -= removed
    return count


def steps_back(schedule: list[int]) -> int:
    """By how much a step exceeds an earlier one, at most."""
    return max((step - min(schedule[:block]) for block, step in enumerate(schedule) if block), default=0)


def one_token(geometry: Geometry) -> int:
    """MACs of one more token in one block, at the full sequence, where it costs most."""
    projections = 4 * geometry.dim * geometry.attention_dim
    return projections + geometry.mlp_macs + 2 * geometry.attention_dim * (2 * geometry.tokens + 1)


def most(geometry: Geometry) -> float:
    """Largest rate the solver reaches, read off its own error."""
    with pytest.raises(ScheduleError, match="at most") as caught:
        solve_schedule(geometry, macs=1)
    return float(str(caught.value).split("at most ")[1].split()[0])


@bounded
@given(geometries(), st.floats(0, 1))
def test_reaches_the_rate_and_wastes_no_token(geometry: Geometry, share: float) -> None:
    rate = share * saved(geometry, halving(geometry)) * (1 - 1e-9)
    schedule = solve_schedule(geometry, rate=rate)
    assert schedule_problems(schedule, geometry) == []
    target = geometry_macs(geometry) * (1 - rate)
    left = geometry_macs(geometry, schedule)
    assert left <= target
    # The next weaker schedule, too dear, leaves one block one token more. A block that removes half of its patches
    # follows the block before it: a token more there may be a token more here.
    assert target - left < (1 + halved_blocks(geometry, schedule)) * one_token(geometry)
    assert steps_back(schedule) <= 1  # the rounding


@pytest.mark.parametrize(
    ("patches", "prefix"),
    [(0, 1), (0, 5), *((patches, prefix) for patches in (1, 2, 3, 5, 49, 196, 1369, 1495) for prefix in (0, 1, 5))],
)
@pytest.mark.parametrize("depth", [1, 2, 3, 12, 40, 48])
def test_every_rate_is_met_or_refused_with_the_limit(depth: int, patches: int, prefix: int) -> None:
    geometry = plain_vit(depth, patches + prefix, prefix, 384)
    limit = saved(geometry, halving(geometry))
    for rate in (0.1, 0.3, 0.45, 0.6, 0.75, 0.9):
        if rate > limit:
            with pytest.raises(ScheduleError, match="at most") as caught:
                solve_schedule(geometry, rate=rate)
            stated = float(re.findall(r"at most (\S+) of", str(caught.value))[0])
            assert limit - 1e-3 < stated <= limit  # three digits, rounded down: what it names can be had
            solve_schedule(geometry, rate=stated)
            continue
        schedule = solve_schedule(geometry, rate=rate)
        assert schedule_problems(schedule, geometry) == [] and steps_back(schedule) <= 1
        waste = geometry_macs(geometry) * (1 - rate) - geometry_macs(geometry, schedule)
        assert 0 <= waste < (1 + halved_blocks(geometry, schedule)) * one_token(geometry)


def test_the_largest_rate_halves_in_every_block() -> None:
    geometry = plain_vit(5, 197, 1)
    assert solve_schedule(geometry, macs=geometry_macs(geometry, halving(geometry))) == [98, 49, 24, 12, 6]


def test_equal_half_steps_are_given_back_one_by_one() -> None:
    # 3, 2, 3, 2, ... stands for steps of 2.5: its neighbours differ in one block, not in every other one.
    schedules = {tuple(solve_schedule(VIT_B, rate=0.07 + step / 2e4)) for step in range(250)}
    costs = sorted(geometry_macs(VIT_B, list(schedule)) for schedule in schedules)
    assert len(costs) > 10
    assert all(after - before < one_token(VIT_B) for before, after in pairwise(costs))


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
    with pytest.raises(
        ScheduleError, match=r"at most 0\.000 .* \(nothing can merge: 2 tokens, 1 of them prefix.*\), asked for 0\.100"
    ):
        solve_schedule(geometry, rate=0.1)


@pytest.mark.parametrize("depth", [1, 12])
def test_a_model_of_nothing_but_prefix_tokens(depth: int) -> None:
    geometry = replace(VIT_B, depth=depth, tokens=3, prefix_tokens=3)
    assert solve_schedule(geometry, rate=0.0) == [0] * depth
    with pytest.raises(ScheduleError, match="nothing can merge: 3 tokens, 3 of them prefix tokens"):
        solve_schedule(geometry, rate=0.1)


def test_two_patches_can_merge() -> None:
    geometry = plain_vit(2, 2, 0)
    assert solve_schedule(geometry, rate=0.1) == [0, 1]
    assert solve_schedule(geometry, rate=0.35) == [1, 0]


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


@pytest.mark.parametrize("level", ["low", "high"])
@pytest.mark.parametrize(
    ("depth", "tokens", "prefix", "name"),
    [
        (12, 197, 1, "vit_base_patch16_224"),
        (24, 197, 1, "vit_large_patch16_224"),
        (12, 198, 2, "deit_base_distilled_patch16_224"),
        # The list depends on depth and patches alone: no class token, or one and four registers.
        (12, 196, 0, "vit_base_patch16_224"),
        (24, 201, 5, "vit_large_patch16_224"),
    ],
)
@pytest.mark.parametrize("dim", [192, 384, 768])
def test_published_geometries_get_the_published_schedule(
    depth: int, tokens: int, prefix: int, name: str, dim: int, level: str
) -> None:
    preset = preset_for(plain_vit(depth, tokens, prefix, dim), level)
    assert tuple(preset) == PRESETS[name][level]
    preset.clear()
    assert tuple(preset_for(plain_vit(depth, tokens, prefix, dim), level)) == PRESETS[name][level]


def test_the_distilled_schedule_is_of_its_own_geometry_only() -> None:
    assert preset_for(plain_vit(12, 199, 3), "low") == preset_schedule("vit_base_patch16_224", "low")
    assert preset_for(plain_vit(24, 198, 2), "low") == preset_schedule("vit_large_patch16_224", "low")


# Model: geometry, saved share at "low" and at "high". The published shapes save 0.50 and 0.71 of ViT-B. Attention's
# products shrink with the square of the tokens, so they fall by more than the rest, and the more tokens there are (and
# the narrower the model is), the larger a part they are of the whole: 4 % of ViT-B at 197 tokens, 37 % of ViT-S at
# 1,370. Prefix tokens stay: five of them beside 196 patches cost a hundredth.
EXTENDED = {
    "vit_tiny_patch16_224": (plain_vit(12, 197, 1, 192), 0.504, 0.707),
    "vit_huge_patch14_224": (plain_vit(32, 257, 1, 1280, 14), 0.504, 0.709),
    "vit_base_patch16_384": (plain_vit(12, 577, 1), 0.510, 0.719),
    "vit_small_patch14_dinov2, 518 px": (plain_vit(12, 1370, 1, 384, 14), 0.541, 0.739),
    "vit_giant_patch14_224": (plain_vit(40, 257, 1, 1408, 14), 0.509, 0.708),
    "vit_giant_patch14, 518 px": (plain_vit(40, 1370, 1, 1408, 14), 0.518, 0.723),
    "vit_gigantic_patch14_224": (plain_vit(48, 257, 1, 1664, 14), 0.509, 0.709),
    "vit_so400m_patch14_224": (plain_vit(27, 256, 0, 1152, 14), 0.509, 0.713),
    "vit_base, 4 registers": (plain_vit(12, 201, 5), 0.491, 0.698),
    "vit_base, no class token": (plain_vit(12, 196, 0), 0.503, 0.715),
    "vit_base_patch32_224": (plain_vit(12, 50, 1, 768, 32), 0.479, 0.694),
    "8 blocks": (plain_vit(8, 197, 1), 0.502, 0.712),
    "6 blocks, 8 x 8 patches": (plain_vit(6, 65, 1, 384), 0.496, 0.696),
}


@pytest.mark.parametrize("model", EXTENDED)
def test_extended_presets_save_what_the_published_ones_do(model: str) -> None:
    geometry, low, high = EXTENDED[model]
    for level, expected in (("low", low), ("high", high)):
        preset = preset_for(geometry, level)
        assert schedule_problems(preset, geometry) == []
        assert saved(geometry, preset) == pytest.approx(expected, abs=0.001)


@bounded
@given(st.integers(6, 48), st.integers(196, 1500), st.integers(0, 1), st.sampled_from([384, 768, 1408]))
def test_presets_save_half_and_seven_tenths(depth: int, patches: int, prefix: int, dim: int) -> None:
    geometry = plain_vit(depth, patches + prefix, prefix, dim)
    low, high = (saved(geometry, preset_for(geometry, level)) for level in ("low", "high"))
    assert 0.49 < low < 0.56 and 0.70 < high < 0.755  # the ends seen: 0.494, 0.557; 0.704, 0.752


@bounded
@given(st.integers(1, 48), st.integers(0, 1500), st.integers(0, 5), st.sampled_from(["low", "high"]))
def test_presets_fit_any_model(depth: int, patches: int, prefix: int, level: str) -> None:
    geometry = plain_vit(depth, patches + prefix, prefix)
    preset = preset_for(geometry, level)
    assert schedule_problems(preset, geometry) == []
    assert preset == sorted(preset, reverse=True)
    # As many patches are left as in the published model, or half of what entered the last block where that is more.
    share = {"low": (10, 6), "high": (4, 4)}[level][depth > 18] / 196
    left = patches - sum(preset)
    assert (
        left == round(share * patches)
        or (left > share * patches - 0.5 and halved_blocks(geometry, preset))
        or left == 1
    )


@pytest.mark.parametrize("level", ["low", "high"])
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (1, 1), (2, 1), (5, 5)])
def test_a_preset_where_nothing_can_merge(tokens: int, prefix: int, level: str) -> None:
    assert preset_for(plain_vit(12, tokens, prefix), level) == [0] * 12


@pytest.mark.parametrize(
    ("geometry", "low", "high"),
    [
        (plain_vit(12, 2, 0), [1, *[0] * 11], [1, *[0] * 11]),
        (plain_vit(12, 5, 0), [1] * 4 + [0] * 8, [1] * 4 + [0] * 8),
        (plain_vit(1, 197, 1), [98], [98]),
        (plain_vit(2, 197, 1), [96, 50], [98, 49]),
        (plain_vit(4, 65, 1), [16, 16, 15, 8], [32, 16, 8, 4]),
    ],
)
def test_presets_of_tiny_and_shallow_models(geometry: Geometry, low: list[int], high: list[int]) -> None:
    assert (preset_for(geometry, "low"), preset_for(geometry, "high")) == (low, high)


@pytest.mark.parametrize("tokens", [197, 65])
def test_unknown_levels(tokens: int) -> None:
    with pytest.raises(ScheduleError, match=r"unknown level 'hihg' \(did you mean 'high'\?\); there are low, high"):
        preset_for(replace(VIT_B, tokens=tokens), "hihg")
    with pytest.raises(ScheduleError, match="unknown level 'middle'; there are low, high"):
        preset_for(replace(VIT_B, tokens=tokens), "middle")


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
