"""Calibrated schedules: what is measured, where merging goes, and how the budget is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pyra import PyraConfig, wrap
from pyra.backbones import wrapped_config
from pyra.backbones.layers import TokenStream
from pyra.cost import Geometry, geometry_macs, token_counts
from pyra.errors import ConfigError, DataError
from pyra.schedule import check_schedule, solve_schedule
from pyra.tasks.schedules.calibration import (
    POWER,
    SHARES,
    Calibration,
    _later,
    calibrate,
    distribute,
    pair_similarity,
    pooled_features,
    relative_change,
    total_drift,
)
from pyra.tasks.schedules.costs import CountedCosts, LayerTimes, MeasuredCosts, private_copy, total
from pyra.tasks.schedules.images import calibration_images
from pyra.tasks.schedules.latency import UnreachableError

SIZES = Geometry(6, 65, 1, 384, 384, 2 * 384 * 1536, 64, 64 * 384 * 588)
CONFIG = PyraConfig(rate=0.5, reactivation=False)


def calibration_of(drift: list[list[float]], geometry: Geometry = SIZES) -> Calibration:
    return Calibration(geometry, SHARES, tuple(map(tuple, drift)), tuple(map(tuple, drift)), 1)


def even(geometry: Geometry = SIZES) -> Calibration:
    return calibration_of([[0.02, 0.05, 0.12, 0.4]] * geometry.depth, geometry)


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes}).eval()


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=6, max_size=6),
    st.floats(0.05, 0.7),
)
def test_the_budget_is_kept_to_a_token_in_a_block(drift: list[list[float]], rate: float) -> None:
    costs, calibration = CountedCosts(SIZES), calibration_of(drift)
    budget = geometry_macs(SIZES) * (1 - rate)
    schedule = distribute(calibration, costs, budget)
    check_schedule(schedule, SIZES)
    assert geometry_macs(SIZES, schedule) <= budget
    assert all(geometry_macs(SIZES, later) > budget for later in _later(schedule, SIZES))
    assert distribute(calibration, costs, budget) == schedule


def test_merging_goes_where_it_disturbs_nothing() -> None:
    drift = [[0.1, 0.2, 0.3, 0.6]] * 6
    drift[2] = [0.0] * 4
    for rate in (0.1, 0.2):
        budget = geometry_macs(SIZES) * (1 - rate)
        schedule = distribute(calibration_of(drift), CountedCosts(SIZES), budget)
        assert schedule[2] >= 0.9 * sum(schedule) > 0
    assert distribute(even(), CountedCosts(SIZES), geometry_macs(SIZES)) == [0] * 6


def test_no_schedule_nearby_disturbs_less_at_no_more_cost() -> None:
    generator = np.random.default_rng(0)
    drift = np.sort(generator.random((6, 4)), axis=1).tolist()
    calibration, budget = calibration_of(drift), geometry_macs(SIZES) * 0.5
    found = distribute(calibration, CountedCosts(SIZES), budget)
    best = total_drift(calibration, found)
    assert best < total_drift(calibration, solve_schedule(SIZES, rate=0.5))
    for source in range(6):
        for target in range(6):
            moved = list(found)
            moved[source] -= 3
            moved[target] += 3
            fits = moved[source] >= 0
            if fits and source != target and not _problems(moved) and geometry_macs(SIZES, moved) <= budget:
                assert total_drift(calibration, moved) >= best - 0.01


def _problems(schedule: list[int]) -> bool:
    try:
        check_schedule(schedule, SIZES)
    except Exception:
        return True
    return False


def test_the_exact_optimum_of_a_small_model() -> None:
    """Against every schedule of two layers: at the prices' own budgets nothing is better."""
    sizes = Geometry(2, 13, 1, 8, 8, 128, 4)
    calibration = calibration_of([[0.1, 0.3, 0.35, 0.9], [0.02, 0.05, 0.2, 0.7]], sizes)
    costs = CountedCosts(sizes)
    every = [[a, b] for a in range(7) for b in range((12 - a) // 2 + 1)]
    for rate in (0.05, 0.1, 0.15, 0.2):
        budget = geometry_macs(sizes) * (1 - rate)
        within = [schedule for schedule in every if geometry_macs(sizes, schedule) <= budget]
        best = min(total_drift(calibration, schedule) for schedule in within)
        found = distribute(calibration, costs, budget)
        assert found in within
        assert total_drift(calibration, found) <= best + 0.05


@settings(deadline=None, max_examples=10)
@given(st.floats(1.05, 2.5))
def test_a_budget_of_seconds(speedup: float) -> None:
    tokens = (3, 65)
    triples = tuple((n / 65, n / 65 + 0.02, 0.75 * n / 65 + 0.02) for n in tokens)
    costs = MeasuredCosts(SIZES, 0.3, (LayerTimes(tuple(range(6)), tokens, triples, triples[-1]),), 1, 1.0)
    assume(costs.plain / speedup > 2.4)
    schedule = distribute(even(), costs, costs.plain / speedup)
    assert total(costs, schedule) <= costs.plain / speedup
    assert any(schedule)


def test_out_of_reach() -> None:
    with pytest.raises(UnreachableError) as unreachable:
        distribute(even(), CountedCosts(SIZES), 1.0)
    assert unreachable.value.best == geometry_macs(SIZES, [32, 16, 8, 4, 2, 1])


def test_curves_are_of_shares_and_never_fall() -> None:
    calibration = calibration_of([[0.1, 0.05, 0.3, 0.6]] * 6)
    whole, half = calibration.of_layer(0, 65), calibration.of_layer(0, 33)
    assert len(whole) == 33 and len(half) == 17
    assert (np.diff(whole) >= 0).all() and whole[0] == 0
    np.testing.assert_allclose(whole[::2], half)
    assert whole[8] == pytest.approx(0.1**POWER)
    schedule = [4, 3, 0, 0, 0, 0]
    entering = zip(token_counts(SIZES, schedule)[:-1], schedule, strict=True)
    parts = (calibration.of_layer(layer, count)[removed] for layer, (count, removed) in enumerate(entering))
    assert total_drift(calibration, schedule) == pytest.approx(sum(parts))


def test_what_is_measured_is_the_layers_own_merging() -> None:
    model, images = tiny(), torch.randn(6, 3, 32, 32)
    found = calibrate(model, images, CONFIG, shares=(0.25, 0.5), batch_size=4)
    assert wrapped_config(model) is None and found.images == 6
    alone = wrap(private_copy(model), replace(CONFIG, rate=None, schedule=[0, 16, 0, 0]))
    expected = relative_change(pooled_features(alone, images), pooled_features(model, images))
    assert found.drift[1][0] == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    assert calibrate(model, images, CONFIG, shares=(0.25, 0.5), batch_size=4) == found
    assert all(best >= least for best, least in found.similarity)


def duplicate(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make every even patch a copy of the one before it, as long as none has merged."""
    tokens = given[0].tokens if isinstance(given[0], TokenStream) else given[0]
    if tokens.shape[1] != 65:
        return given
    tokens = tokens.clone()
    tokens[:, 2::2] = tokens[:, 1::2]
    return (given[0].holding(tokens) if isinstance(given[0], TokenStream) else tokens, *given[1:])


def test_a_layer_of_duplicates_gets_the_merging() -> None:
    """Its pairs are the same token twice, and merging them changes nothing, as sizes weigh them twice."""
    images, budgets = torch.randn(4, 3, 32, 32), {}
    for copies in (False, True):
        model = tiny(global_pool="avg", class_token=True)
        if copies:
            model.blocks[2].register_forward_pre_hook(duplicate)
        similarity = pair_similarity(model, images, CONFIG)
        assert bool(similarity[2].min() > 0.9999) is copies
        found = calibrate(model, images, CONFIG)
        assert (max(found.drift[2]) < 1e-4) is copies
        assert min(min(found.drift[0]), min(found.drift[1])) > 1e-3
        budgets[copies] = distribute(found, CountedCosts(found.geometry), geometry_macs(found.geometry) * 0.85)
    assert sum(budgets[True][:2]) <= 1 < 5 < sum(budgets[False][:2])
    assert budgets[True][2] > budgets[False][2]


@pytest.mark.parametrize("shares", [(), (0.5, 0.25), (0.0, 0.5), (0.25, 0.6)])
def test_wrong_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="shares must rise"):
        calibrate(tiny(), torch.randn(1, 3, 32, 32), CONFIG, shares=shares)


def test_images_that_cannot_calibrate() -> None:
    with pytest.raises(DataError, match="at least one image"):
        calibrate(tiny(), torch.randn(0, 3, 32, 32), CONFIG)
    with pytest.raises(DataError, match="not finite"):
        calibrate(tiny(), torch.full((1, 3, 32, 32), float("nan")), CONFIG)


def test_images_of_a_folder_and_of_a_task(tmp_path: Path) -> None:
    model = tiny()
    for number in range(5):
        file = tmp_path / "deep" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (number * 40, 0, 0)).save(file)
    (tmp_path / "notes.txt").write_text("no picture")
    three = calibration_images(str(tmp_path), model, 3, seed=1)
    assert three.shape == (3, 3, 32, 32)
    assert torch.equal(calibration_images(str(tmp_path), model, 3, seed=1), three)
    assert len(calibration_images(str(tmp_path), model, 9)) == 5
    assert not torch.equal(calibration_images(str(tmp_path), model, 3, seed=2), three)
    shades = {round(float(image[0, 0, 0]), 3) for image in calibration_images(str(tmp_path), model, 5)}
    assert shades == {round((number * 40 / 255 - 0.5) / 0.5, 3) for number in range(5)}
    assert calibration_images("demo", model, 2).shape == (2, 3, 32, 32)
    (tmp_path / "deep" / "broken.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        calibration_images(str(tmp_path), model, 6)
    with pytest.raises(DataError, match="nonsense"):
        calibration_images("nonsense", model, 6)
