"""Costs of layers: counted ones are the library's MACs, measured ones add up to the model and know what merges."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyra import PyraConfig
from pyra.backbones import wrapped_config
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ScheduleError
from pyra.matching import removable
from pyra.schedule import schedule_at
from pyra.tasks.schedules import costs as measured
from pyra.tasks.schedules.costs import CountedCosts, LayerTimes, MeasuredCosts, measure_costs, token_grid, total

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
VIT_B = Geometry(12, 197, 1, 768, 768, 2 * 768 * 3072, 64, 196 * 768 * 768, pooling_macs=11)
CONFIG = PyraConfig(rate=0.5)


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes}).eval()


def measured_by_hand(geometry: Geometry = VIT_B) -> MeasuredCosts:
    """A millisecond a layer at all tokens, half of it at half; matching costs a fifth of that."""
    tokens = (3, 99, 197)
    triples = tuple((n / 197, 1.2 * n / 197, 0.8 * n / 197) for n in tokens)
    times = LayerTimes(tuple(range(geometry.depth)), tokens, triples, (0.9, 1.1, 0.7))
    return MeasuredCosts(geometry, 0.5, (times,), 1, 1.0)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 3))
def test_counted_costs_are_macs(pressure: float) -> None:
    schedule = schedule_at(VIT_B, pressure)
    assert total(CountedCosts(VIT_B), schedule) == geometry_macs(VIT_B, schedule)


def test_measured_costs_between_the_points() -> None:
    costs = measured_by_hand()
    assert costs.plain == pytest.approx(0.5 + 12 * 0.9)
    whole = costs.of_layer(0, 197)
    assert len(whole) == removable(197, 1) + 1
    assert whole[[0, 1, -1]] == pytest.approx([0.9, 1.1, 0.7])
    between = costs.of_layer(3, 148)  # tokens merged before: they carry sizes
    assert between[[0, 1, -1]] == pytest.approx([148 / 197, 1.2 * 148 / 197, 0.8 * 148 / 197])
    assert (between[1:-1] > between[2:]).all()
    assert len(costs.of_layer(3, 2)) == 1
    assert total(costs, [1] + [0] * 11) == pytest.approx(0.5 + 1.1 + 11 * 196 / 197)


@pytest.mark.parametrize("matching", ["bipartite", "local"])
def test_a_model_is_measured_and_left_as_it_is(matching: str) -> None:
    model = tiny()
    before = {name: (id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    costs = measure_costs(model, torch.randn(2, 3, 32, 32), PyraConfig(rate=0.5, matching=matching), rounds=1)
    assert {name: (id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()} == before
    assert wrapped_config(model) is None
    assert costs.batch_size == 2 and costs.geometry.tokens == 65
    (times,) = costs.times
    assert times.layers == (0, 1, 2)
    assert times.tokens[0] == 3 and times.tokens[-1] == 65
    assert all(value > 0 for triple in (*times.merged, times.first) for value in triple)
    assert costs.plain > costs.fixed > 0


def test_what_is_timed_is_what_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job runs its layer at its own token count and removes as many as it says."""
    seen: list[tuple[int, int, bool]] = []
    real = measured._layer_job

    def job(layer, removed, stream, more, named):
        run = real(layer, removed, stream, more, named)

        def checked() -> None:
            handle = layer.mlp.register_forward_pre_hook(
                lambda _, given: seen.append((stream.tokens.shape[1], given[0].shape[1], stream.size is not None))
            )
            run()
            handle.remove()

        return checked

    monkeypatch.setattr(measured, "_layer_job", job)
    measure_costs(tiny(), torch.randn(1, 3, 32, 32), CONFIG, points=2, rounds=1)
    assert set(seen) == {
        (3, 3, True), (3, 2, True), (65, 65, True), (65, 64, True), (65, 33, True),
        (65, 65, False), (65, 64, False), (65, 33, False),
    }  # fmt: skip


def test_rotary_models_and_transformers() -> None:
    rotary = timm.create_model(
        "eva02_tiny_patch14_224", **{**TINY, "img_size": 28, "patch_size": 7, "num_heads": 4}
    ).eval()
    assert measure_costs(rotary, torch.randn(1, 3, 28, 28), CONFIG, points=2, rounds=1).geometry.tokens == 17
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config).eval()
    assert measure_costs(model, torch.randn(1, 3, 32, 32), CONFIG, points=2, rounds=1).plain > 0


def test_layers_of_other_shapes_are_timed_apart() -> None:
    model = tiny()
    model.blocks[1].mlp = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    assert measured.shapes_of(model) == [[0, 2], [1]]


def test_token_counts_that_are_timed() -> None:
    assert token_grid(VIT_B, 6) == (3, 6, 13, 32, 79, 197) or token_grid(VIT_B, 6)[::5] == (3, 197)
    assert list(token_grid(VIT_B, 6)) == sorted(set(token_grid(VIT_B, 6)))
    assert token_grid(Geometry(1, 3, 1, 8, 8, 8, 8), 6) == (3,)


def test_nothing_to_merge() -> None:
    with pytest.raises(ScheduleError, match="nothing can merge: 2 tokens"):
        measure_costs(tiny(img_size=4), torch.randn(1, 3, 4, 4), CONFIG)
