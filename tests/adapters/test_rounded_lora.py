"""LoRA on layers that train as they will be rounded: the forward is that of the folded weights, rounded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra import PyraConfig
from pyra.adapters import BottleneckConfig, adapt, add_adapter, fold_adapter, load_adapter, save_adapter, switch_adapter
from pyra.adapters.rounded_lora import RoundedLora
from pyra.errors import ConfigError
from pyra.experts.quantising import rounded
from pyra.export.linear_training import (
    LINEAR,
    fake_quantise_linear,
    is_rounded,
    trains_as_rounded,
    undo_fake_quantise_linear,
)

pytest.importorskip("torchao", reason="the extra `torchao` is not installed")

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
TARGETS = ["qkv", "fc1", "fc2"]
MERGING = PyraConfig(schedule=[4, 2])


def backbone() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SIZE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changes})


def redrawn(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw what trains anew, so that the adapter does something."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def adapted(merging: PyraConfig | None = MERGING, **changes: Any) -> nn.Module:
    return redrawn(adapt(fake_quantise_linear(backbone()), pyra=merging, peft=lora(**changes)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IMAGES)
    return found


def layers(model: nn.Module) -> list[RoundedLora]:
    return [module for module in model.modules() if isinstance(module, RoundedLora)]


@pytest.mark.parametrize("merging", [MERGING, None])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_deployed_is_what_trains(merging: PyraConfig | None, scaled: bool) -> None:
    model = adapted(merging, use_rslora=scaled)
    assert len(layers(model)) == 2 * len(TARGETS)
    trained = logits(model)
    floats = logits(undo_fake_quantise_linear(copy.deepcopy(model)))
    folded = fold_adapter(model)
    assert not layers(folded) and torch.equal(logits(folded), trained)
    plain = undo_fake_quantise_linear(folded)
    assert not trains_as_rounded(plain)
    assert torch.allclose(logits(plain), floats, atol=1e-4) and (floats - trained).abs().max() > 0.01
    for module in plain.modules():
        if type(module) is nn.Linear:
            module.weight.data = rounded(module.weight.data, LINEAR)
    assert torch.equal(logits(plain), trained)


def test_a_layer_rounds_the_weight_with_the_adapter_in_it_and_gradients_reach_the_factors() -> None:
    layer = layers(adapted())[1]
    base, first, second = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inputs = torch.randn(7, base.in_features, generator=torch.Generator().manual_seed(3))
    weight = (base.weight + second @ first * 1.5).detach()
    found = layer(inputs)
    assert torch.equal(found, F.linear(inputs, rounded(weight, LINEAR), base.bias))
    beside = F.linear(inputs, rounded(base.weight.detach(), LINEAR) + (weight - base.weight), base.bias)
    assert (found - beside).abs().max() > 1e-3  # what peft would compute, and folding would change
    found.square().sum().backward()
    whole = fake_quantise_linear(nn.Sequential(nn.Linear(base.in_features, base.out_features)))[0]
    whole.weight.data, whole.bias.data = weight, base.bias.detach()
    whole(inputs).square().sum().backward()
    gradient = whole.weight.grad
    assert gradient is not None and gradient.any()
    assert torch.allclose(first.grad, 1.5 * second.T @ gradient, rtol=1e-4, atol=1e-4)
    assert torch.allclose(second.grad, 1.5 * gradient @ first.T, rtol=1e-4, atol=1e-4)
    assert base.weight.grad is None


def test_saved_and_loaded_it_stays_itself(tmp_path: Path) -> None:
    model = adapted()
    trained = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(fake_quantise_linear(backbone()), tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained) and layers(loaded)
    floats = load_adapter(backbone(), tmp_path / "adapter")  # what is saved is an ordinary adapter
    assert not layers(floats) and torch.allclose(logits(floats), logits(undo_fake_quantise_linear(model)), atol=1e-4)


def test_undoing_gives_the_forward_of_peft() -> None:
    model, stock = adapted(), redrawn(adapt(backbone(), pyra=MERGING, peft=lora()))
    undo_fake_quantise_linear(model)
    assert not any(is_rounded(module) for module in model.modules())
    assert all(type(layer.base_layer) is nn.Linear for layer in layers(model))
    assert torch.equal(logits(model), logits(stock))


def test_an_adapter_that_is_switched_off() -> None:
    model = adapted(None)
    trained = logits(model)
    with model.disable_adapter():  # type: ignore[operator]
        layer, inputs = layers(model)[0], torch.randn(2, 32)
        assert torch.equal(layer(inputs), layer.base_layer(inputs))
    assert not torch.equal(layer(inputs), layer.base_layer(inputs))
    assert torch.equal(logits(model), trained)


def test_several_adapters(tmp_path: Path) -> None:
    save_adapter(redrawn(adapted(None), 5), tmp_path / "second")
    save_adapter(redrawn(adapted(None), 6), tmp_path / "third")
    model = load_adapter(fake_quantise_linear(backbone()), tmp_path / "second")
    second = logits(model)
    add_adapter(model, tmp_path / "third", "third")
    assert torch.equal(logits(model), second)
    switch_adapter(model, "third")
    alone = load_adapter(fake_quantise_linear(backbone()), tmp_path / "third")
    assert torch.equal(logits(model), logits(alone)) and not torch.equal(logits(model), second)
    layer, inputs = layers(model)[0], torch.randn(2, 32)
    layer.set_adapter(["default", "third"])
    together = layer(inputs)
    layer.merge()
    assert torch.equal(layer(inputs), together)


def test_in_half_precision_the_weight_is_folded_in_full() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits(model)
    folded = fold_adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(folded), trained) and trained.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora(lora_dropout=0.1), "lora_dropout=0.1"),
        (lora(lora_bias=True), "lora_bias=True"),
        (lora(bias="lora_only"), "bias='lora_only'"),
        (lora(fan_in_fan_out=True), "fan_in_fan_out=True"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (lora(use_dora=True), "Dora"),
        (peft.AdaLoraConfig(target_modules=TARGETS, total_step=9), "AdaLoraConfig"),
        (peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]), "IA3Config"),
        (BottleneckConfig(width=4), "BottleneckConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_fold_before_it_is_rounded_is_refused(config: peft.PeftConfig, said: str) -> None:
    model = fake_quantise_linear(backbone())
    before = logits(model)
    with pytest.raises(ConfigError, match="as they will be rounded take plain LoRA, not ") as error:
        adapt(model, pyra=MERGING, peft=config)
    text = str(error.value)
    assert said in text and "\n" not in text and "LoraConfig(lora_dropout=0)" in text
    assert torch.equal(logits(model), before) and not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("config", [lora(lora_dropout=0.1), lora(use_dora=True), BottleneckConfig(width=4)])
def test_a_saved_adapter_of_another_kind_is_refused(config: peft.PeftConfig, tmp_path: Path) -> None:
    save_adapter(adapt(backbone(), pyra=MERGING, peft=config), tmp_path / "adapter")
    model = fake_quantise_linear(backbone())
    before = logits(model)
    with pytest.raises(ConfigError, match=r"take plain LoRA, not .* \(the backbone is as it was\)"):
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), before)


def test_what_is_adapted_already_is_refused() -> None:
    with pytest.raises(ConfigError, match="round it first, and adapt it then"):
        fake_quantise_linear(adapt(backbone(), peft=lora()))


def test_methods_without_layers_of_their_own_are_taken() -> None:
    model = adapt(fake_quantise_linear(backbone()), pyra=MERGING)
    assert trains_as_rounded(model) and not layers(model)
