"""Every architecture name of timm's plain vision transformers: it merges, and rightly so, or says truly why it cannot.

The names come from timm's registry. Their sizes are shrunk, with everything kept that makes an architecture what it is.
No list says which of them merge: the test looks for itself at what a model is made of and how its blocks run.
``COUNTS`` says how many there are of each kind, so that a change in either direction shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models import deit, eva, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyra import PyraConfig, UnsupportedModelError, unwrap, wrap
from pyra.backbones import geometry, macs, wrapped_config, wrapped_schedule
from pyra.backbones.layers import merging_layers
from pyra.cost import matching_macs

PLAIN = (vision_transformer, eva, deit)
SWEPT = ("vision_transformer", "eva", "deit", "vision_transformer_hybrid", "vision_transformer_relpos", "beit")
# None of these merges: the first, the middle and the last name of each stand for all.
SAMPLED = ("naflexvit", "vision_transformer_sam", "swin_transformer", "swin_transformer_v2", "cait", "volo", "xcit")
SAMPLED += ("hiera", "mvitv2", "pvt_v2", "vitamin")
COUNTS = {
    "vision_transformer": {"merges": 155, "blocks": 8},
    "eva": {"merges": 64, "blocks": 1},
    "deit": {"merges": 16},
    "vision_transformer_hybrid": {"patches": 14},
    "vision_transformer_relpos": {"bias": 14},
    "beit": {"bias": 7},
}
# What the constructors offer beyond what any name asks for.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-without-weights": ("vit_tiny_patch16_224", {"global_pool": "prr"}),
    "averaged-attention-without-weights": (
        "vit_tiny_patch16_224",
        {"global_pool": "prr", "class_token": False, "reg_tokens": 2},
    ),
    "maximum": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "average-and-maximum": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "no-pooling": ("vit_tiny_patch16_224", {"global_pool": ""}),
    "no-positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "padding": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": (30, 31)}),
    "differential": ("vit_tiny_patch16_224", {"attn_layer": "diff", "qk_norm": True, "scale_attn_norm": True}),
    "three-dimensional-rotations": ("vit_small_patch16_rope_224", {"rope_type": "mrope", "rope_grid_indexing": "ij"}),
    "grouped-queries": ("vit_small_patch16_rope_224", {"qkv_fused": False, "num_kv_heads": 2}),
    "attention-over-registers": (
        "vit_small_patch16_rope_224",
        {"global_pool": "map", "num_reg_tokens": 3, "class_token": False},
    ),
}
SCHEDULE = [0, 8, 5]
DOUBLES_SCHEDULE = [14, 6, 0]  # whichever equal pairs go first, every step finds this many equal pairs


def names(module: str) -> list[str]:
    found = timm.list_models(module=module)
    return found if module in SWEPT else found[:: max((len(found) - 1) // 2, 1)]


CASES = [pytest.param(module, name, id=name) for module in (*SWEPT, *SAMPLED) for name in names(module)]


def arguments(name: str) -> dict[str, Any]:
    """What a name of a plain family passes to its class."""
    with pytest.MonkeyPatch.context() as patch:
        for module in PLAIN:
            patch.setattr(module, "build_model_with_cfg", lambda *_, **values: values)
        values: dict[str, Any] = timm.models.model_entrypoint(name)()
    return values


def shallow(name: str, depth: int) -> dict[str, Any]:
    """Options for ``depth`` blocks, evenly spaced ones where the architecture's blocks differ."""
    heads = arguments(name).get("num_kv_heads")
    if heads is None:
        return {"depth": depth}
    return {"depth": depth, "num_kv_heads": [heads[i * (len(heads) - 1) // (depth - 1)] for i in range(depth)]}


def tiny(name: str, **options: Any) -> nn.Module:
    """The architecture with 3 blocks, 32 channels and 8 x 8 patches; where images are not square, fewer columns."""
    real, blocks = arguments(name), shallow(name, 3)
    if "num_kv_heads" in blocks:
        blocks["num_kv_heads"] = [4 * heads // real["num_heads"] for heads in blocks["num_kv_heads"]]
    size = real.get("img_size", 224)
    height, width = size if isinstance(size, tuple) else (size, size)
    sizes = {"img_size": (32, 4 * round(8 * width / height)), "patch_size": 4, "embed_dim": 32, "num_heads": 4}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{**sizes, **blocks, "num_classes": 6, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh class tokens, biases and layer scales are (almost) zero
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False)


def make(module: str, name: str) -> nn.Module:
    """A tiny model of a plain family, or one of another without memory."""
    if module in SWEPT[:3]:
        return tiny(name)
    with torch.device("meta"):
        options = {"depth": 2} if module in SWEPT else {}
        return timm.create_model(name, **options)


def hindrances(model: nn.Module) -> dict[str, str]:
    """What a model is made of that keeps its tokens from merging, by kind, in the words of the message."""
    found, kind = {}, type(model)
    tables = ("relative_position_bias_table", "rel_pos", "shared_rel_pos", "rel_pos_h", "cpb_mlp")
    if any(getattr(module, table, None) is not None for module in model.modules() for table in tables):
        found["bias"] = "relative position bias"
    elif any(getattr(module, "window_size", None) for module in model.modules()):
        found["windows"] = "windows of a fixed grid"
    if kind not in (VisionTransformer, VisionTransformerDistilled, Eva):
        found["class"] = f"{kind.__name__} is not timm's plain VisionTransformer"
    elif hasattr(model.patch_embed, "backbone"):
        found["patches"] = f"patches come from a {type(model.patch_embed).__name__} (a hybrid)"
    elif order_of_calls(model) != ["norm1", "attn", "norm2", "mlp"]:
        found["blocks"] = f"blocks ({type(model.blocks[0]).__name__}) are not pre-norm attention followed by an MLP"
    return found


def order_of_calls(model: nn.Module) -> list[str]:
    """The children with weights of the first block, in the order in which it calls them."""
    called: list[str] = []
    block = model.blocks[0]
    for name, child in block.named_children():
        if list(child.parameters()) and not name.startswith("ls"):  # a scale by channel is part of its branch
            child.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    block(torch.zeros(1, 9, model.embed_dim, device=next(block.parameters()).device))
    for child in block.children():
        child._forward_pre_hooks.clear()
    return called


def pictures(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2))


def two_kinds_of_patches(model: nn.Module) -> Tensor:
    """Images whose left and right half repeat one patch each: every merged pair is of identical tokens."""
    rows, columns = model.patch_embed.grid_size
    patches = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    return torch.cat([patches[:, :, side].repeat(1, 1, rows, columns // 2) for side in range(2)], dim=3)


def forget_positions(model: nn.Module) -> None:
    """Make the tokens of identical patches identical: no position embedding, and rotations by nothing."""
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    if getattr(model, "rope", None) is not None:
        turn = model.rope.get_embed

        def still(*args: Any, **kwargs: Any) -> Tensor:
            sine, cosine = turn(*args, **kwargs).chunk(2, dim=-1)
            return torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)

        model.rope.get_embed = still


def count(model: nn.Module) -> float:
    """Torch's own count of the MACs of one image, up to the head."""
    image = torch.zeros(1, 3, *model.patch_embed.img_size, device=next(model.parameters()).device)
    # The fused kernel of CPUs is unknown to the counter.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.forward_head(model.forward_features(image), pre_logits=True)
    return counter.get_total_flops() / 2


def assert_merges(model: nn.Module) -> None:
    """Wrapped it is finite, as long, and different; wrapped without removing anything, or unwrapped, it is itself."""
    images = pictures(model)
    expected, tokens, maps = model(images), model.forward_features(images), intermediates(model, images)
    wrap(model, PyraConfig(schedule=SCHEDULE))
    merged, merged_maps = model(images), intermediates(model, images)
    assert merged.shape == expected.shape and merged.isfinite().all()
    assert not torch.allclose(merged, expected, rtol=1e-3, atol=1e-4)
    assert model.forward_features(images).shape == tokens.shape
    assert [m.shape for m in merged_maps] == [m.shape for m in maps]
    assert torch.equal(merged_maps[0], maps[0]) and not torch.equal(merged_maps[1], maps[1])
    for layer in merging_layers(model):
        layer.step = replace(layer.step, removed=0)
    assert torch.equal(model(images), expected)
    unwrap(model)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(a, b) for a, b in zip(intermediates(model, images), maps, strict=True))


def intermediates(model: nn.Module, images: Tensor) -> list[Tensor]:
    maps: list[Tensor] = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    return maps


def assert_counts_its_macs(model: nn.Module, config: PyraConfig) -> None:
    """The MACs we promise are torch's own count to the last one, with those of the matching, promised apart."""
    alike = len({getattr(block.attn, "num_kv_heads", None) for block in model.blocks}) == 1
    tolerance = 0 if alike else 0.01  # blocks that differ count as their mean
    assert count(model) == pytest.approx(macs(model), rel=tolerance, abs=0)
    wrap(model, config)
    schedule = wrapped_schedule(model)
    assert schedule is not None and any(schedule)
    assert count(model) == pytest.approx(macs(model) + matching_macs(geometry(model), schedule), rel=tolerance, abs=0)
    unwrap(model)


def assert_takes_doubles_for_one(model: nn.Module) -> None:
    """Merging identical tokens changes nothing: sizes, attention, rotations and pooling treat them as what they are."""
    forget_positions(model)
    images = two_kinds_of_patches(model)
    expected = model(images)
    wrap(model, PyraConfig(schedule=DOUBLES_SCHEDULE, reactivation=False))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "name"), CASES)
def test_every_name(module: str, name: str) -> None:
    model = make(module, name)
    found = hindrances(model)
    if not found:
        assert_merges(model)
        assert_counts_its_macs(model, PyraConfig(schedule=SCHEDULE, reactivation=False))
        assert_takes_doubles_for_one(model)
        return
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=f"^{name} cannot be merged: ") as refusal:
        wrap(model, PyraConfig(rate=0.2))
    assert any(reason in str(refusal.value) for reason in found.values()), (str(refusal.value), found)
    assert list(model.state_dict()) == before and wrapped_config(model) is None


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str) -> None:
    name, options = OPTIONS[option]
    model = tiny(name, **options)
    assert not hindrances(model)
    assert_merges(model)
    assert_counts_its_macs(model, PyraConfig(schedule=SCHEDULE, reactivation=False))
    if not model.patch_embed.dynamic_img_pad:
        assert_takes_doubles_for_one(model)


def test_no_name_is_left_out() -> None:
    swept = [case.values[1] for case in CASES if case.values[0] in SWEPT]
    assert sorted(swept) == sorted(timm.list_models(module=list(SWEPT)))
    assert {case.values[0] for case in CASES} == {*SWEPT, *SAMPLED}


@pytest.mark.parametrize("module", SWEPT)
def test_how_many_merge(module: str) -> None:
    kinds = Counter(next(iter(hindrances(make(module, name))), "merges") for name in names(module))
    assert kinds == COUNTS[module]


@pytest.mark.slow  # a model of its own size in all but depth for each name
@pytest.mark.parametrize("module", SWEPT[:3])
def test_macs_of_the_real_sizes(module: str) -> None:
    for name in names(module):
        with torch.device("meta"):
            model = timm.create_model(name, **shallow(name, 4)).eval().requires_grad_(False)
            if not hindrances(model):
                assert_counts_its_macs(model, PyraConfig(rate=0.4, reactivation=False))
