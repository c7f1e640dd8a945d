"""Every matching option in whole models: results, shapes, traces, and what each of them promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_families import FAMILIES, build, config, images, result, run, trained
from torch import Tensor, nn

from pyra import PyraConfig, UnsupportedModelError, token_features, wrap
from pyra.backbones.features import source_maps
from pyra.errors import ConfigError, ScheduleError

OPTIONS: dict[str, dict[str, Any]] = {
    "energy": {"matching": "energy"},
    "local": {"matching": "local"},
    "threshold": {"threshold": 0.99},
    "prune": {"matching": "prune", "reactivation": False},
}


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


@pytest.mark.parametrize("family", ["timm-deit-distilled", "timm-eva-dinov3", "timm-siglip", "hf-dinov2-registers"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_in_models(option: str, family: str) -> None:
    inputs = FAMILIES[family].inputs()
    model = trained(wrap(build(family), config(**OPTIONS[option])))
    found = values(model, inputs)
    default = values(trained(wrap(build(family), config())), inputs)
    assert found.shape == default.shape and found.isfinite().all()
    assert not torch.allclose(found, default, atol=1e-6)
    merged = token_features(model, inputs["pixel_values"], source_map=True)
    assert merged.size.shape[1] == merged.source_map.shape[1] - 13  # the schedule's count, whatever the option
    doubled = {"pixel_values": inputs["pixel_values"].double()}
    torch.testing.assert_close(values(model.double(), doubled).float(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compiles and exports each option
@pytest.mark.parametrize("option", OPTIONS)
def test_options_compile_and_export(option: str) -> None:
    inputs = FAMILIES["timm-vit"].inputs()
    model = trained(wrap(build("timm-vit"), config(**OPTIONS[option])))
    expected = values(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(values(compiled, inputs), expected, rtol=1e-5, atol=1e-5)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(program(inputs["pixel_values"][:2]), expected[:2], rtol=1e-5, atol=1e-5)


def test_local_groups_lie_together() -> None:
    """At one patch a step a group of neighbours spans few patches; the default joins patches from anywhere."""
    pixels = images()["pixel_values"]

    def widest(**options: Any) -> int:
        model = wrap(build("timm-vit"), config(schedule=[8, 4, 0], reactivation=False, **options))
        groups = source_maps(model, pixels)[0][:, 1:].reshape(3, 8, 8)
        spans = [
            max(int(index.max() - index.min()) for index in (group == row).nonzero(as_tuple=True))
            for group in groups
            for row in group.unique()
        ]
        return max(spans)

    assert widest(matching="local") <= 2  # a destination and its neighbours on both sides
    assert widest(matching="local", window=3) <= 6
    assert widest() > 2


def test_local_matching_follows_the_grid_of_the_input() -> None:
    model = wrap(build("timm-vit", dynamic_img_size=True), config(matching="local", reactivation=False))
    assert values(model, images(2, (48, 48))).isfinite().all()
    with pytest.raises(ScheduleError, match="60 patches, neither 8 x 8 as the wrapped model nor a square"):
        values(model, images(2, (24, 40)))
    oblong = wrap(build("timm-vit", img_size=(24, 40)), config(matching="local", reactivation=False))
    assert values(oblong, images(2, (24, 40))).isfinite().all()


@pytest.mark.parametrize("family", ["hf-siglip2", "hf-vit-mae"])
def test_local_matching_needs_a_grid(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="patches in no fixed order: matching='local' needs a grid"):
        wrap(build(family), config(matching="local"))


def test_pruned_tokens_add_nothing() -> None:
    model = wrap(build("timm-vit"), config(matching="prune", reactivation=False))
    merged = token_features(model, images()["pixel_values"], source_map=True)
    assert torch.equal(merged.size, torch.ones_like(merged.size))


def test_a_threshold_between_merging_and_pruning() -> None:
    inputs, options = images(), {"reactivation": False}
    merged = values(wrap(build("timm-vit"), config(**options)), inputs)
    pruned = values(wrap(build("timm-vit"), config(matching="prune", **options)), inputs)
    assert torch.equal(values(wrap(build("timm-vit"), config(threshold=-1.0, **options)), inputs), merged)
    none_as_alike = values(wrap(build("timm-vit"), config(threshold=1.0, **options)), inputs)
    torch.testing.assert_close(none_as_alike, pruned)
    assert not torch.allclose(merged, pruned, atol=1e-6)


def test_dropped_pairs_take_no_part_in_reactivation() -> None:
    inputs = images()
    plain = values(wrap(build("timm-vit"), config(threshold=1.0, reactivation=False)), inputs)
    torch.testing.assert_close(values(trained(wrap(build("timm-vit"), config(threshold=1.0))), inputs), plain)


def test_pruning_has_nothing_to_reactivate() -> None:
    with pytest.raises(ConfigError, match="reactivation=False"):
        PyraConfig(rate=0.5, matching="prune")
