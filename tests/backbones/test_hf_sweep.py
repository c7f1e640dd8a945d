"""transformers' image models: each merges, and is itself while nothing merges, or says truly why its tokens cannot.

A layer is recognised by its parts, so a model may look right and compute something else. Every tower that is accepted
is therefore run, shrunk; and a slow test looks through all of transformers for towers that are accepted but not here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pyra import PyraConfig, UnsupportedModelError, unwrap, wrap
from pyra.backbones import geometry, locate, macs, wrapped_config
from pyra.backbones.layers import merging_layers
from pyra.cost import matching_macs

TOWERS = [
    "altclip.AltCLIPVisionModel",
    "chinese_clip.ChineseCLIPVisionModel",
    "clip.CLIPVisionModel",
    "clipseg.CLIPSegVisionModel",
    "metaclip_2.MetaClip2VisionModel",
    "owlvit.OwlViTVisionTransformer",
    "owlv2.Owlv2VisionTransformer",
    "kosmos2.Kosmos2VisionTransformer",
    "deit.DeiTModel",
    "vit.ViTModel",
    "vit_mae.ViTMAEModel",
    "vit_msn.ViTMSNModel",
    "ijepa.IJepaModel",
    "dinov2.Dinov2Model",
    "dinov2.Dinov2Backbone",
    "dinov2_with_registers.Dinov2WithRegistersModel",
    "dinov2_with_registers.Dinov2WithRegistersBackbone",
    "tipsv2.Tipsv2VisionModel",
    "tipsv2.Tipsv2VisionBackbone",
    "dinov3_vit.DINOv3ViTModel",
    "dinov3_vit.DINOv3ViTBackbone",
    "sapiens2.Sapiens2Model",
    "sapiens2.Sapiens2Backbone",
    "siglip.SiglipVisionModel",
    "siglip2.Siglip2VisionModel",
    "janus.JanusVisionModel",
    "idefics2.Idefics2VisionTransformer",
    "idefics3.Idefics3VisionTransformer",
    "smolvlm.SmolVLMVisionTransformer",
    "phi4_multimodal.Phi4MultimodalVisionModel",
]
LAYERS, WINDOWS = "its layers are not those of ViT, DINO, CLIP or SigLIP", "windows of a fixed grid"
REFUSED = {
    "bert.BertModel": "reads input_ids, not images",
    "clip.CLIPTextModel": "reads input_ids, not images",
    "siglip.SiglipTextModel": "reads input_ids, not images",
    "resnet.ResNetModel": "no patch embeddings",
    "convnext.ConvNextModel": LAYERS,
    "swin.SwinModel": "relative position bias",
    "sam.SamVisionModel": "relative position bias",
    "vitdet.VitDetModel": WINDOWS,
    "rf_detr.RfDetrDinov2Backbone": WINDOWS,
    "beit.BeitModel": LAYERS,
    "blip.BlipVisionModel": LAYERS,  # one projection for queries, keys and values
    "internvl.InternVLVisionModel": LAYERS,  # the layer has scales of its own
    "mlcd.MLCDVisionModel": LAYERS,  # rotates the class token, too
    "radio.RadioModel": LAYERS,  # packs images into one sequence
    "minicpmv4_6.MiniCPMV4_6VisionModel": LAYERS,  # packs images into one sequence
    "yolos.YolosModel": LAYERS,
    "pixtral.PixtralVisionModel": "no patch embeddings",
    "vivit.VivitModel": "cut from videos",
    "granite_docling.GraniteDoclingVisionModel": "its connector may read tokens between layers",
}
SIZES = {
    "hidden_size": 32,
    "embed_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 4,
    "num_patches": 64,
}
SCHEDULE = [0, 8, 5]


def model_class(path: str) -> type[PreTrainedModel]:
    module, name = path.split(".")
    home = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    found: type[PreTrainedModel] = getattr(home, name)
    return found


def tiny(path: str) -> PreTrainedModel:
    """The tower with 3 layers, 32 channels and 8 x 8 patches; no parameter is zero or one."""
    cls = model_class(path)
    default = cls.config_class()
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if getattr(default, name, None) is not None}
    sizes = {k: [v, v] if isinstance(getattr(default, k), (list, tuple)) else v for k, v in sizes.items()}
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes, **({"mask_ratio": 0.0} if "MAE" in path else {}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def inputs(path: str, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if "iglip2" in path:  # patches of any aspect, the last ones padding
        patches = torch.randn(count, 64, 48, generator=generator)
        seen = (torch.arange(64) < 63).int().repeat(count, 1)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": seen,
            "spatial_shapes": torch.tensor([[7, 9]] * count),
        }
    images = {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
    if "MAE" in path:  # the order of its random masking
        images["noise"] = torch.rand(count, 64, generator=generator)
    return images


def tokens(model: nn.Module, images: dict[str, Tensor]) -> Tensor:
    out = model(**images)
    found: Tensor = out.last_hidden_state if "last_hidden_state" in out else out.feature_maps[-1]
    return found


def count_macs(model: nn.Module, images: dict[str, Tensor]) -> float:
    """Torch's own count; the fused kernel of CPUs is unknown to the counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**images)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("path", TOWERS)
def test_merges(path: str) -> None:
    model, images, one = tiny(path), inputs(path), inputs(path, 1)
    expected, sizes = tokens(model, images), geometry(model)
    plain_macs, plain_count = macs(model), count_macs(model, one)
    assert plain_count == pytest.approx(plain_macs, rel=0.01)
    wrap(model, PyraConfig(schedule=SCHEDULE, reactivation=False))
    merged = tokens(model, images)
    assert merged.shape == expected.shape and merged.isfinite().all()
    assert not torch.allclose(merged, expected, rtol=1e-3, atol=1e-4)
    promised = macs(model) + matching_macs(sizes, SCHEDULE)
    assert count_macs(model, one) == pytest.approx(promised, rel=0.01)
    for layer in merging_layers(model):
        layer.step = replace(layer.step, removed=0)
    assert torch.equal(tokens(model, images), expected)
    unwrap(model)
    assert torch.equal(tokens(model, images), expected)


@pytest.mark.parametrize("path", REFUSED)
def test_refused(path: str) -> None:
    cls = model_class(path)
    with torch.device("meta"):
        model = cls(cls.config_class())
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=f"cannot be merged: .*{REFUSED[path]}"):
        wrap(model, PyraConfig(rate=0.2))
    assert list(model.state_dict()) == before and wrapped_config(model) is None


@pytest.mark.slow  # imports and builds (without memory) all of transformers' image models
@pytest.mark.filterwarnings("ignore")
def test_no_other_tower_is_accepted() -> None:
    """Models that cannot be built from their default configuration, or lack a package, are not looked at."""
    accepted = set()
    for cls in image_models():
        try:
            with torch.device("meta"):
                model = cls(cls.config_class())
        except Exception:
            continue
        try:
            _, core = locate(model)
        except UnsupportedModelError:
            continue
        accepted.add(f"{type(core).__module__.split('.')[-2]}.{type(core).__name__}")
    assert accepted == set(TOWERS)


def image_models() -> Iterator[type[PreTrainedModel]]:
    for module in modeling_modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or not issubclass(cls, PreTrainedModel) or cls.__module__ != module.__name__:
                continue
            if cls.config_class is not None and (cls.main_input_name == "pixel_values" or "Vision" in cls.__name__):
                yield cls


@cache
def modeling_modules() -> list[Any]:
    found = []
    for module in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if module.name.rpartition(".")[2].startswith("modeling_"):
            with suppress(ImportError):  # a package it needs is missing
                found.append(importlib.import_module(module.name))
    return found
