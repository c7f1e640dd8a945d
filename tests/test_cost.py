"""MACs: the published table, and agreement with torch's own counter."""

from __future__ import annotations

import peft
import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyra import PyraConfig, UnsupportedModelError, macs, schedule_for, wrap
from pyra.adapters import adapt
from pyra.backbones import geometry
from pyra.cost import geometry_macs, matching_macs, token_counts
from pyra.errors import ScheduleError

SCHEDULE = [6, 0, 5, 3]
# Paper, table 1 and appendix: model, level, tokens left, GMACs, GMACs unmerged, ideal speed-up. The distilled DeiT's
# speed-ups are stated against ViT-B/16 without a distillation token.
PUBLISHED = [
    ("vit_base_patch16_224", "low", 11, 8.77, "vit_base_patch16_224", 17.56, 2.00),
    ("vit_base_patch16_224", "high", 5, 5.07, "vit_base_patch16_224", 17.56, 3.46),
    ("vit_large_patch16_224", "low", 7, 30.96, "vit_large_patch16_224", 61.55, 1.99),
    ("vit_large_patch16_224", "high", 5, 17.91, "vit_large_patch16_224", 61.55, 3.44),
    ("deit_base_distilled_patch16_224", "low", 42, 9.65, "vit_base_patch16_224", 17.56, 1.82),
    ("deit_base_distilled_patch16_224", "high", 6, 5.16, "vit_base_patch16_224", 17.56, 3.40),
]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def tiny(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
    return timm.create_model(name, **{**settings, **kwargs}).eval()


def counted(model: nn.Module, *pixels: int) -> int:
    """Flops that torch counts in one forward; its table has no fused attention of the CPU, so that runs unfused."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *(pixels or (32, 32))))
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "level", "left", "merged", "against", "plain", "speedup"), PUBLISHED)
def test_published_table(
    name: str, level: str, left: int, merged: float, against: str, plain: float, speedup: float
) -> None:
    model = on_meta(name)
    schedule = schedule_for(model, preset=level)
    assert token_counts(geometry(model), schedule)[-1] == left
    assert round(macs(model, schedule) / 1e9, 2) == merged
    assert round(macs(on_meta(against)) / 1e9, 2) == plain
    assert round(macs(on_meta(against)) / macs(model, schedule), 2) == pytest.approx(speedup, abs=0.011)


def test_half_of_vit_b() -> None:
    model = on_meta("vit_base_patch16_224")
    assert schedule_for(model, rate=0.5) == schedule_for(model, preset="low")
    assert schedule_for(model, macs=macs(model) // 2) == schedule_for(model, preset="low")


MODELS = {
    "class_token": lambda: tiny(),
    "distilled": lambda: tiny("deit_tiny_distilled_patch16_224"),
    "registers": lambda: tiny("vit_small_patch14_reg4_dinov2"),
    "average": lambda: tiny(class_token=False, global_pool="avg"),
    "swiglu": lambda: tiny("vit_giant_patch14_dinov2", mlp_ratio=4),
}


@pytest.mark.parametrize("schedule", [[0, 0, 0, 0], SCHEDULE], ids=["plain", "merged"])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_torch(name: str, schedule: list[int]) -> None:
    model = MODELS[name]()
    wrap(model, PyraConfig(schedule=schedule, reactivation=False))
    # Not in `macs`: the head(s), and the similarity scores, which have a count of their own.
    heads = sum(head.weight.numel() for name, head in model.named_modules() if name in ("head", "head_dist"))
    assert counted(model) == 2 * (macs(model) + heads + matching_macs(geometry(model), schedule))


def test_reactivation_is_not_counted_and_small() -> None:
    model = wrap(tiny(), PyraConfig(schedule=SCHEDULE))
    plain = wrap(tiny(), PyraConfig(schedule=SCHEDULE, reactivation=False))
    assert macs(model) == macs(plain)
    assert counted(model) - counted(plain) == 2 * sum(SCHEDULE) * 2 * 48  # delta_D and delta_r: r x C each


def test_as_the_model_runs() -> None:
    model = tiny()
    plain = macs(model)
    merged = macs(model, SCHEDULE)
    assert merged < plain == macs(model, [0] * 4)
    wrap(model, PyraConfig(schedule=SCHEDULE))
    assert (macs(model), macs(model, [0] * 4)) == (merged, plain)
    adapted = adapt(model, pyra=None, peft=peft.LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"]))
    assert (macs(adapted), macs(adapted, [0] * 4)) == (merged, plain)


def test_input_size() -> None:
    model = tiny(dynamic_img_size=True)
    for size, pixels in ((48, (48, 48)), ((16, 40), (16, 40))):
        assert counted(model, *pixels) == 2 * (macs(model, input_size=size) + model.head.weight.numel())
    assert macs(model, input_size=32) == macs(model)


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (33, "not a multiple of the patch size 4 x 4"),
        ((32, 30), "not a multiple of the patch size 4 x 4"),
        (0, "must be a positive number of pixels"),
        ((32, -4), "must be a positive number of pixels"),
        ((32,), "must be a positive number of pixels"),
        ("32", "must be a positive number of pixels"),
    ],
)
def test_input_size_that_does_not_fit(size: int | tuple[int, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        macs(tiny(), input_size=size)


def test_schedule_that_does_not_fit() -> None:
    model = tiny()
    with pytest.raises(ScheduleError, match="has 2 entries, the model has 4 blocks"):
        macs(model, [1, 1])
    with pytest.raises(ScheduleError, match="block 0 removes 33 of 65 tokens: at most 32"):
        macs(model, [33, 0, 0, 0])
    wrap(model, PyraConfig(schedule=[30, 0, 0, 0]))
    with pytest.raises(ScheduleError, match="block 0 removes 30 of 17 tokens: at most 8"):
        macs(model, input_size=16)


@pytest.mark.parametrize("targets", [{}, {"rate": 0.1, "macs": 9}, {"rate": 0.1, "preset": "low"}])
def test_schedule_for_takes_one_target(targets: dict[str, object]) -> None:
    with pytest.raises(ScheduleError, match="exactly one of rate, macs and preset"):
        schedule_for(tiny(), **targets)


def test_schedule_for_other_inputs_and_models() -> None:
    model = tiny()
    large = schedule_for(model, rate=0.4, input_size=64)
    assert macs(model, large, input_size=64) <= 0.6 * macs(model, input_size=64)
    assert sum(large) > sum(schedule_for(model, rate=0.4))
    for level, share in (("low", 0.5), ("high", 0.7)):  # the published shape, carried over to 4 blocks, 65 tokens
        carried = schedule_for(model, preset=level)
        assert carried == sorted(carried, reverse=True)
        assert share - 0.2 < 1 - macs(model, carried) / macs(model) < share + 0.02
        assert sum(schedule_for(model, preset=level, input_size=64)) > 3 * sum(carried)
    with pytest.raises(ScheduleError, match="unknown level 'hihg'"):
        schedule_for(model, preset="hihg")
    with pytest.raises(UnsupportedModelError):
        schedule_for(nn.Linear(2, 2), rate=0.5)


def test_macs_needs_one_entry_a_block() -> None:
    with pytest.raises(ValueError, match="schedule has 1 entries for 4 blocks"):
        geometry_macs(geometry(tiny()), [1])
