"""Visual prompts: what they compute, that they never merge, and where they have no place."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from backbone_families import FAMILIES, SIDE, build, config, images, result, run, trained
from torch import Tensor, nn

from pyra import PyraConfig, macs, token_features, wrap
from pyra.adapters import VisualPromptsConfig, adapt, fold_adapter, load_adapter, save_adapter
from pyra.adapters.prompts import PromptsLayer
from pyra.backbones import geometry, locate
from pyra.backbones.layers import merging_layers
from pyra.errors import ConfigError, UnsupportedModelError

P = 3
# Rotary attention of timm counts prefix tokens itself; padded and masked inputs choose their tokens.
REFUSED = [name for name in FAMILIES if name.startswith("timm-eva") or name in ("hf-siglip2", "hf-vit-mae")]
TAKEN = [name for name in FAMILIES if name not in REFUSED]


def prompted(family: str, deep: bool = True, pyra: PyraConfig | None = None, **options: Any) -> nn.Module:
    """A model whose prompts, drawn close to zero, matter."""
    model = adapt(build(family, **options), pyra=pyra, peft=VisualPromptsConfig(num_prompts=P, deep=deep))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "visual_prompts" in name:
            nn.init.normal_(parameter)
    return trained(model).eval()


def prompts_of(model: nn.Module) -> nn.Parameter:
    return next(parameter for name, parameter in model.named_parameters() if "visual_prompts" in name)


def values(model: nn.Module, family: str = "timm-vit") -> Tensor:
    with torch.no_grad():
        return result(run(model, FAMILIES[family].inputs()))


def among(tokens: Tensor, prompts: Tensor, prefix: int, replace: bool) -> Tensor:
    rest = tokens[:, prefix + (P if replace else 0) :]
    return torch.cat([tokens[:, :prefix], prompts.expand(len(tokens), -1, -1), rest], dim=1)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["timm-vit", "timm-average", "timm-deit-distilled", "hf-vit"])
def test_the_equations(family: str, deep: bool) -> None:
    """Section 3.2 of the paper, step by step on the plain model."""
    model, plain = prompted(family, deep), build(family)
    prompts, pixels = prompts_of(model), images()["pixel_values"]
    assert prompts.shape == (3 if deep else 1, P, 32)
    prefix = 2 if family == "timm-deit-distilled" else 1
    with torch.no_grad():
        if family == "hf-vit":
            x, layers = plain.vit.embeddings(pixels), plain.vit.layers
        else:
            x, layers = plain.norm_pre(plain._pos_embed(plain.patch_embed(pixels))), plain.blocks
        x = among(x, prompts[0], prefix, replace=False)
        for index, layer in enumerate(layers):
            if deep and index:
                x = among(x, prompts[index], prefix, replace=True)
            x = layer(x)
        without = torch.cat([x[:, :prefix], x[:, prefix + P :]], dim=1)  # heads see class tokens and patches
        if family == "hf-vit":
            expected = plain.classifier(plain.vit.layernorm(without)[:, 0])
        else:
            expected = plain.forward_head(plain.norm(without))
    torch.testing.assert_close(values(model, family), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, values(plain, family), atol=1e-2)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", TAKEN)
def test_prompts_never_merge(family: str, deep: bool) -> None:
    inputs = FAMILIES[family].inputs()
    before = geometry(build(family))
    model = prompted(family, deep, config())
    core = locate(model)[1]
    after = geometry(model)
    assert (after.prefix_tokens, after.tokens) == (before.prefix_tokens + P, before.tokens + P)
    steps = [layer.step for layer in merging_layers(core)]
    assert {step.prefix for step in steps} == {before.prefix_tokens + P}
    pixels = inputs.pop("pixel_values")
    inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = token_features(model, pixels, source_map=True, **inputs)
    leading = torch.arange(before.prefix_tokens + P)
    assert found.num_prefix_tokens == len(leading)
    assert torch.equal(found.source_map[:, : len(leading)], leading.expand(len(pixels), -1))
    assert (found.size[:, : len(leading)] == 1).all()
    assert not (found.source_map[:, len(leading) :, None] == leading).any(), "no patch merges into one of them"
    assert found.tokens.shape[1] == after.tokens - 13
    assert macs(model, [0, 0, 0]) > macs(build(family), [0, 0, 0])


@pytest.mark.parametrize("family", TAKEN)
def test_round_trip_of_every_family(family: str, tmp_path: Path) -> None:
    model = prompted(family, pyra=config())
    expected = values(model, family)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        prompts_of(model).neg_()
    assert not torch.allclose(values(model, family), expected, atol=1e-3), "what is restored must matter"
    loaded = load_adapter(build(family), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(values(loaded, family), expected, atol=1e-5, rtol=1e-4)
    folded = fold_adapter(loaded)
    assert not any(isinstance(module, PromptsLayer) for module in folded.modules())
    for kept in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(values(kept, family), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_where_prompts_have_no_place(family: str) -> None:
    with pytest.raises(ConfigError, match=r"takes no visual prompts: its (attention counts|embeddings take)"):
        prompted(family)


def test_positions_that_depend_on_the_count_of_prefix_tokens() -> None:
    with pytest.raises(ConfigError, match="dynamic_img_size=False"):
        prompted("timm-vit", dynamic_img_size=True)
    model = prompted("timm-dinov2-registers", dynamic_img_size=True)  # positions of patches alone
    assert model(torch.randn(1, 3, SIDE + 8, SIDE)).shape == (1, 6)


@pytest.mark.parametrize("merging", [True, False])
def test_every_layer_trains_its_prompts(merging: bool) -> None:
    model = prompted("timm-vit", pyra=config() if merging else None)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for part in ("visual_prompts", "head", "reactivation")) for name in names)
    model.train()
    run(model, images()).square().mean().backward()
    gradients = prompts_of(model).grad
    assert gradients.shape == (3, P, 32)
    assert (gradients.abs().amax(dim=2) > 0).all()


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_gradient_checkpointing(family: str) -> None:
    def gradients(checkpointed: bool) -> Tensor:
        model = prompted(family, pyra=config()).train()
        base = model.get_base_model()
        if checkpointed:
            base.set_grad_checkpointing() if family == "timm-vit" else base.gradient_checkpointing_enable()
        result(run(model, images())).square().mean().backward()
        found: Tensor = prompts_of(model).grad
        return found

    torch.testing.assert_close(gradients(True), gradients(False))


def test_maps_between_the_layers() -> None:
    pixels = images()["pixel_values"]
    for pyra in (None, config()):
        base = prompted("timm-vit", pyra=pyra).get_base_model()
        maps = base.forward_intermediates(pixels, intermediates_only=True)
        assert [tuple(found.shape) for found in maps] == [(3, 32, 8, 8)] * 3
        hf = prompted("hf-vit", pyra=pyra)
        states = hf(pixels, output_hidden_states=True).hidden_states
        assert {state.shape[1] for state in states} == {1 + P + 64}


@pytest.mark.parametrize("family", ["timm-average", "hf-vit"])
def test_switched_off_and_taken_out(family: str) -> None:
    base = values(build(family), family)
    model = prompted(family)
    expected = values(model, family)
    counted = geometry(model).prefix_tokens
    with model.disable_adapter():
        assert torch.equal(values(model, family), base)
        assert geometry(model).prefix_tokens == counted - P
    assert geometry(model).prefix_tokens == counted
    assert torch.equal(values(model, family), expected)
    model.merge_adapter()
    torch.testing.assert_close(values(model, family), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(values(model, family), expected)
    plain = model.unload()
    assert torch.equal(values(plain, family), base)
    assert geometry(plain).prefix_tokens == counted - P
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_a_copy_has_prompts_of_its_own() -> None:
    model = prompted("timm-vit", pyra=config())
    expected = values(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(values(twin), expected)
        with torch.no_grad():
            prompts_of(twin).neg_()
        assert not torch.allclose(values(twin), expected, atol=1e-3)
        assert torch.equal(values(model), expected)


def test_compiled_as_one_graph() -> None:
    model = prompted("timm-vit", pyra=config())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(values(compiled), values(model))


def test_dropout_on_prompts_in_training_alone() -> None:
    model = adapt(build("timm-vit"), peft=VisualPromptsConfig(num_prompts=P, dropout=0.5))
    with torch.no_grad():
        prompts_of(model).fill_(1.0)
    assert torch.equal(values(model.eval()), values(model))
    assert not torch.equal(values(model.train()), values(model))


def test_they_start_as_published() -> None:
    model = adapt(build("timm-vit"), peft=VisualPromptsConfig(num_prompts=200))
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert prompts_of(model).abs().max() <= bound
    assert prompts_of(model).abs().max() > 0.99 * bound


def test_wrong_input() -> None:
    with pytest.raises(ConfigError, match="prompts come before merging"):
        adapt(wrap(build("timm-vit"), config()), peft=VisualPromptsConfig())
    with pytest.raises(ConfigError, match="tokens do not come from there"):
        adapt(build("timm-vit"), peft=VisualPromptsConfig(target_modules=["norm1"]))
    model = prompted("timm-vit")
    with pytest.raises(ConfigError, match="one adapter"):
        model.add_adapter("second", VisualPromptsConfig(target_modules="norm_pre"))
    for wrong in ({"num_prompts": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match="num_prompts must be positive and dropout in"):
            VisualPromptsConfig(**wrong)
    with pytest.raises(ConfigError, match="need an image encoder"):
        adapt(timm.create_model("test_resnet", num_classes=3), peft=VisualPromptsConfig())


def test_an_encoder_that_is_no_tensor_of_tokens() -> None:
    layer = peft.get_peft_model(build("timm-vit"), VisualPromptsConfig(target_modules="norm_pre")).get_base_model()
    with pytest.raises(UnsupportedModelError, match=r"need tokens \[B, N, C\]"):
        layer.norm_pre(torch.zeros(3, 4))
