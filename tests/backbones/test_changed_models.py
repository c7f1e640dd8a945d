"""Models that something else changed, before or after wrapping: they merge, or the error says what is in the way."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pyra import PyraConfig, UnsupportedModelError, macs, schedule_for, unwrap, wrap
from pyra.backbones.layers import merging_layers

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **options}).eval().requires_grad_(False)


def config(removed: int = 8, **options: Any) -> PyraConfig:
    return PyraConfig(schedule=[removed] * 3, **{"reactivation": False, **options})


def compile_blocks(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def test_blocks_that_were_compiled_merge() -> None:
    model = wrap(compile_blocks(vit()), config())
    assert torch.equal(model(IMAGES), wrap(vit(), config())(IMAGES))


def test_blocks_compiled_since_are_unwrapped_and_wrapped_anew() -> None:
    model = compile_blocks(wrap(vit(), config()))
    torch.testing.assert_close(model(IMAGES), wrap(vit(), config())(IMAGES))
    wrap(model, config(2))
    assert torch.equal(model(IMAGES), wrap(vit(), config(2))(IMAGES))
    assert torch.equal(unwrap(model)(IMAGES), vit()(IMAGES))


@pytest.mark.parametrize("part", ["", "attn"])
def test_a_forward_of_its_own_on_an_instance_is_refused(part: str) -> None:
    model = vit()
    patched = model.blocks[1].get_submodule(part)
    patched.forward = type(patched).forward.__get__(patched)
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        wrap(model, config())
    assert not list(merging_layers(model))


def test_an_attention_patched_since_is_refused() -> None:
    model = wrap(vit(), config())
    attention = model.blocks[1].attn
    attention.forward = type(attention).forward.__get__(attention)
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        model(IMAGES)
    assert torch.equal(unwrap(model)(IMAGES), vit()(IMAGES))


class Shifted(Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x) + 1


def test_a_block_with_a_forward_of_its_own_class_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks \(Shifted\)"):
        wrap(vit(block_fn=Shifted), config())


def test_no_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="no blocks"):
        wrap(vit(depth=0), PyraConfig(rate=0.1))


def test_tracing_says_what_to_use() -> None:
    with pytest.raises(UnsupportedModelError, match=r"use torch\.export"):
        torch.jit.trace(wrap(vit(), config()), IMAGES)


def test_linear_layers_with_parts_count_as_linear_layers() -> None:
    plain, parametrised = vit(), vit()
    for block in parametrised.blocks:
        nn.utils.parametrizations.weight_norm(block.attn.qkv)
    assert macs(parametrised) == macs(plain)
    assert schedule_for(parametrised, rate=0.4) == schedule_for(plain, rate=0.4)


def test_weights_that_no_training_could_follow() -> None:
    model = vit()
    for module in model.blocks[2].modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to(torch.int8), requires_grad=False))
    with pytest.raises(UnsupportedModelError, match="layer 2 has no weights of 16 bits"):
        wrap(model, config(reactivation=True))
    assert not list(merging_layers(model))


def test_wrapped_in_inference_mode_and_trained() -> None:
    model = vit()
    with torch.inference_mode():
        wrap(model, config(reactivation=True))
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None for layer in merging_layers(model) for p in layer.reactivation.parameters())


def test_modules_put_around_layers_are_named_by_unwrap() -> None:
    model = wrap(vit(), config())
    model.blocks[1] = nn.Sequential(model.blocks[1])
    with pytest.raises(UnsupportedModelError, match="take them off before unwrapping"):
        unwrap(model)
    model.blocks[1] = model.blocks[1][0]
    assert torch.equal(unwrap(model)(IMAGES), vit()(IMAGES))


def test_local_matching_refuses_dropped_patches() -> None:
    with pytest.raises(UnsupportedModelError, match="no fixed order"):
        wrap(timm.create_model("vit_tiny_patch16_224", **SIZES, patch_drop_rate=0.5), config(matching="local"))


def test_flex_attention_is_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    settings = transformers.ViTConfig(**sizes, image_size=32, patch_size=4)
    model = transformers.ViTModel._from_config(settings, attn_implementation="flex_attention").eval()
    wrap(model, config())
    with pytest.raises(UnsupportedModelError, match="'flex_attention' takes no size bias"), torch.no_grad():
        model(IMAGES)


def test_what_stands_in_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=64, patch_size=4))
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 40:] = 0
    inputs = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[8, 8], [5, 8]])}
    some = torch.randn(2, 64, 48)
    other = torch.where(mask[:, :, None] == 1, some, 7 * torch.randn(2, 64, 48))
    wrap(model.eval(), config())
    with torch.no_grad():
        first, second = (model(pixel_values=pixels, **inputs).pooler_output for pixels in (some, other))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_sums_over_many_patches_do_not_leave_half_precision() -> None:
    from pyra import Reactivation, match_tokens, merge_tokens

    tokens = torch.randn(1, 17, 32)
    tokens[..., 0] = 700.0
    tokens, size = tokens.half(), torch.full((1, 17, 1), 60, dtype=torch.int32)
    plan = match_tokens(tokens, 4)
    plainly, _ = merge_tokens(tokens, size, plan)
    reactivated, _ = merge_tokens(tokens, size, plan, Reactivation(4, 32, dtype=torch.half))
    assert torch.equal(reactivated, plainly)
