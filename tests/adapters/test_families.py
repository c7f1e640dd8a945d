"""adapt, train, save, load and fold on every family; PEFT before or after wrapping; the text side left alone."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from backbone_families import FAMILIES, build, config, result, run, trained
from torch import Tensor, nn

from pyra import wrap
from pyra.adapters import adapt, fold_adapter, load_adapter, save_adapter
from pyra.backbones import locate, wrapped_config
from pyra.errors import ConfigError


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


def train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        result(run(model, inputs)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, method: str, tmp_path: Path) -> None:
    inputs = FAMILIES[family].inputs()
    torch.manual_seed(0)
    model = adapt(build(family), pyra=config(), peft=peft.LoraConfig(r=2) if method == "lora" else None)
    trained(model).eval()
    start = values(model, inputs)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, inputs)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    expected = values(model, inputs)
    assert not torch.allclose(expected, start, atol=1e-5)
    save_adapter(model, tmp_path)
    loaded = load_adapter(build(family), tmp_path)
    assert wrapped_config(loaded) == config()
    torch.testing.assert_close(values(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values(fold_adapter(loaded), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained(family: str) -> None:
    """LoRA in the image encoder's queries, keys and values; heads and re-activation whole; nothing else."""
    model = adapt(build(family), pyra=config(), peft=peft.LoraConfig(r=2))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    core = {id(p) for p in locate(model)[1].parameters()}
    own = dict(model.named_parameters())
    lora = [name for name in names if "lora_" in name]
    assert len(lora) in (2 * 3, 2 * 9)  # fused or not, in three layers
    assert all(id(own[name]) in core for name in lora)
    rest = {name for name in names if name not in lora and "reactivation" not in name}
    assert all("head" in name or "classifier" in name for name in rest), rest
    assert sum("reactivation" in name for name in names) == 8


@pytest.mark.parametrize("how", ["adapt", "wrap"])
@pytest.mark.parametrize(
    "family", ["timm-vit", "timm-eva-dinov3", "hf-dinov2", "hf-clip-two-towers", "hf-timm-wrapper"]
)
def test_peft_before_merging(family: str, how: str, tmp_path: Path) -> None:
    """Merging that comes after PEFT trains, saves and loads as merging that came before."""
    inputs = FAMILIES[family].inputs()
    model = adapt(build(family), peft=peft.LoraConfig(r=2, init_lora_weights=False))
    plain = values(model.eval(), inputs)
    assert (adapt(model, pyra=config()) if how == "adapt" else wrap(model, config())) is model
    trained(model)
    train(model, inputs)
    expected = values(model, inputs)
    assert not torch.allclose(expected, plain, atol=1e-5)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(values(load_adapter(build(family), tmp_path), inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_second_method_is_refused() -> None:
    model = adapt(build("hf-vit"), peft=peft.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="already carries an adapter"):
        adapt(model, pyra=config(), peft=peft.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="already carries an adapter"):
        adapt(model)
