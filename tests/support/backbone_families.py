"""Tiny models of every family, with inputs: what the matrix and its worker processes run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from pyra import PyraConfig

SIDE, PATCH, DEPTH = 32, 4, 3
SCHEDULE = [0, 8, 5]
TIMM = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": DEPTH, "num_heads": 4, "num_classes": 6}
HF = {"num_hidden_layers": DEPTH, "num_attention_heads": 4, "hidden_size": 32, "patch_size": PATCH}
IMAGE = {"image_size": SIDE}
MLP = {"intermediate_size": 48}
TEXT = {**MLP, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 50}
TEXT |= {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_size": 32}
LABELS = {"num_labels": 6}


def images(batch: int = 3, size: tuple[int, int] = (SIDE, SIDE), seed: int = 2) -> dict[str, Tensor]:
    """Inputs of a model that takes pictures."""
    return {"pixel_values": torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))}


def images_and_text(batch: int = 3, **kwargs: Any) -> dict[str, Tensor]:
    """Inputs of a two-tower model."""
    tokens = torch.randint(2, 50, (2, 8), generator=torch.Generator().manual_seed(3))
    return {**images(batch, **kwargs), "input_ids": torch.cat([tokens[:, :7], torch.ones(2, 1, dtype=torch.long)], 1)}


def masked(batch: int = 3, **kwargs: Any) -> dict[str, Tensor]:
    """Inputs of ViT-MAE: the noise decides what it leaves out, and the order."""
    return {**images(batch, **kwargs), "noise": torch.rand(batch, 64, generator=torch.Generator().manual_seed(4))}


def padded(batch: int = 3, seed: int = 2) -> dict[str, Tensor]:
    """Inputs of SigLIP 2: patches, every second sample of another shape with a padded tail."""
    shapes = torch.tensor([[8, 8], [6, 8]] * batch)[:batch]
    mask = torch.arange(64)[None] < shapes.prod(1, keepdim=True)
    patches = torch.randn(batch, 64, 3 * PATCH**2, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": patches, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


@dataclass(frozen=True)
class Family:
    """How a tiny model is made, and its inputs."""

    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Tensor]] = images
    dynamic: dict[str, Any] = field(default_factory=dict)  # options of a model that takes any image size
    call: dict[str, Any] = field(default_factory=dict)  # what its forward needs for another size


def from_timm(name: str, **options: Any) -> Family:
    """A timm family."""

    def make(**more: Any) -> nn.Module:
        return timm.create_model(name, **{**TIMM, **options, **more})

    return Family(make, dynamic={"dynamic_img_size": True})


def from_hf(
    model: str,
    config: str,
    *,
    inputs: Callable[..., dict[str, Tensor]] = images,
    call: dict[str, Any] | None = None,
    nested: bool = False,
    **values: Any,
) -> Family:
    """A transformers family; ``nested``: the values belong to the image side of a two-tower configuration."""

    def hf_make(**more: Any) -> nn.Module:
        vision = {**values, **more}
        settings = {"vision_config": vision, "text_config": TEXT, "projection_dim": 32} if nested else vision
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return Family(hf_make, inputs, call=call if call is not None else {"interpolate_pos_encoding": True})


def hf_timm_wrapper(**more: Any) -> nn.Module:
    """A timm model inside transformers."""
    sizes = {k: v for k, v in TIMM.items() if k != "num_classes"}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=6, model_args={**sizes, **more}
    )
    return transformers.TimmWrapperForImageClassification(config)


FAMILIES: dict[str, Family] = {
    # AugReg, DeiT, DINO and MAE weights are of this class too
    "timm-vit": from_timm("vit_tiny_patch16_224"),
    "timm-average": from_timm("vit_tiny_patch16_224", global_pool="avg"),
    "timm-deit-distilled": from_timm("deit_tiny_distilled_patch16_224"),
    "timm-dinov2": from_timm("vit_small_patch14_dinov2", num_classes=6),
    "timm-dinov2-registers": from_timm("vit_small_patch14_reg4_dinov2"),
    "timm-clip": from_timm("vit_base_patch16_clip_quickgelu_224"),
    "timm-siglip": from_timm("vit_base_patch16_siglip_224"),
    "timm-eva02": from_timm("eva02_tiny_patch14_224", mlp_ratio=2),
    "timm-eva": from_timm("eva_giant_patch14_224", mlp_ratio=2),
    "timm-eva-dinov3": from_timm("vit_small_patch16_dinov3"),
    "timm-eva-perception": from_timm("vit_pe_core_tiny_patch16_384", ref_feat_shape=(8, 8)),
    "timm-eva-mixed-rotations": from_timm("vit_small_patch16_rope_mixed_224"),
    "hf-vit": from_hf("ViTForImageClassification", "ViTConfig", **HF, **IMAGE, **MLP, **LABELS),
    "hf-deit": from_hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **HF, **IMAGE, **MLP, **LABELS),
    "hf-dinov2": from_hf("Dinov2ForImageClassification", "Dinov2Config", **HF, **IMAGE, mlp_ratio=2, **LABELS, call={}),
    "hf-dinov2-registers": from_hf(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        **HF,
        **IMAGE,
        mlp_ratio=2,
        **LABELS,
        call={},
    ),
    "hf-dinov3": from_hf(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        **HF,
        **IMAGE,
        **MLP,
        num_register_tokens=4,
        pos_embed_rescale=None,
        call={},
    ),
    "hf-clip": from_hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **HF, **IMAGE, **MLP, projection_dim=6),
    "hf-clip-two-towers": from_hf("CLIPModel", "CLIPConfig", inputs=images_and_text, nested=True, **HF, **IMAGE, **MLP),
    "hf-siglip": from_hf("SiglipVisionModel", "SiglipVisionConfig", **HF, **IMAGE, **MLP),
    "hf-siglip-classifier": from_hf("SiglipForImageClassification", "SiglipConfig", nested=True, **HF, **IMAGE, **MLP),
    "hf-siglip2": from_hf("Siglip2VisionModel", "Siglip2VisionConfig", inputs=padded, **HF, **MLP, num_patches=64),
    "hf-vit-mae": from_hf("ViTMAEModel", "ViTMAEConfig", inputs=masked, **HF, **IMAGE, **MLP, mask_ratio=0.25),
    "hf-timm-wrapper": Family(hf_timm_wrapper, dynamic={"dynamic_img_size": True}),
}


def build(name: str, **options: Any) -> nn.Module:
    """Return the tiny model of a family in evaluation mode, with weights that make every part matter."""
    torch.manual_seed(0)
    model = FAMILIES[name].make(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh class tokens, biases and layer scales are (almost) zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def trained(model: nn.Module) -> nn.Module:
    """Give the re-activation weights random values, so that they matter."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "reactivation" in name:
            nn.init.normal_(parameter)
    return model


def config(**options: Any) -> PyraConfig:
    """What the matrix wraps with."""
    return PyraConfig(**{"schedule": SCHEDULE, **options})


def run(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """Call a model the way its library does."""
    plain = getattr(model, "_orig_mod", model)  # compiled
    plain = getattr(plain, "module", plain)  # under DDP
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    if "pixel_values" in inspect.signature(plain.forward).parameters:
        return model(**inputs, **kwargs)
    return model(inputs["pixel_values"], **kwargs)


RESULTS = ("logits", "logits_per_image", "image_embeds", "pooler_output", "last_hidden_state")


def result(output: Any) -> Tensor:
    """All floating-point results of a model side by side, [B, ...] flattened: what the ways are compared by."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = [output[name] for name in RESULTS if name in output]
    return torch.cat([value.flatten(1) for value in output if isinstance(value, Tensor)], dim=1)
