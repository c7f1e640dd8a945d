"""Several adapters with different rates on one backbone: each computes what it computes alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_families import FAMILIES, build, result, run
from peft import LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra import PyraConfig, unwrap
from pyra.adapters import (
    VisualPromptsConfig,
    adapt,
    add_adapter,
    fold_adapter,
    load_adapter,
    save_adapter,
    switch_adapter,
)
from pyra.backbones import wrapped_schedule
from pyra.errors import CheckpointError, ConfigError, UnsupportedModelError

FAMILY = "timm-vit"


def values(model: nn.Module, family: str = FAMILY) -> Tensor:
    with torch.no_grad():
        return result(run(model.eval(), FAMILIES[family].inputs()))


def saved(
    folder: Path, pyra: PyraConfig | None, peft: PeftConfig | None = None, family: str = FAMILY, seed: int = 1
) -> tuple[Path, Tensor]:
    """Save an adapter whose every trained weight matters; return its folder and what it computes."""
    model = adapt(build(family), pyra=pyra, peft=peft or LoraConfig(r=2 + seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder)
    return folder, values(model, family)


CONFIGS: dict[str, Any] = {
    "slow": PyraConfig(rate=0.1),
    "fast": PyraConfig(rate=0.4),
    "elastic": PyraConfig(rate=0.3, rate_range=[0.1, 0.4]),
    "late": PyraConfig(schedule=[0, 0, 9]),
    "plain": PyraConfig(rate=0.3, reactivation=False),
    "still": None,
}


@pytest.mark.parametrize("family", ["timm-vit", "hf-dinov2"])
@pytest.mark.parametrize("order", [list(CONFIGS), list(reversed(CONFIGS))], ids=["forth", "back"])
def test_each_computes_what_it_does_alone(order: list[str], family: str, tmp_path: Path) -> None:
    made = {name: saved(tmp_path / name, CONFIGS[name], family=family, seed=i) for i, name in enumerate(order)}
    model = load_adapter(build(family), made[order[0]][0])
    for name in order[1:]:
        assert add_adapter(model, made[name][0], name) is model
        torch.testing.assert_close(values(model, family), made[order[0]][1], rtol=1e-5, atol=1e-5)
    names = {"default" if name == order[0] else name: name for name in order}
    for name in (*names, *reversed(names), *names):
        expected = made[names[name]][1]
        torch.testing.assert_close(values(switch_adapter(model, name), family), expected, rtol=1e-5, atol=1e-5)
    folded = fold_adapter(switch_adapter(model, "fast" if order[0] != "fast" else "default"))
    torch.testing.assert_close(values(folded, family), made["fast"][1], rtol=1e-4, atol=1e-4)


def test_a_rate_that_was_chosen_stays_with_its_adapter(tmp_path: Path) -> None:
    (elastic, expected), (fast, _) = (saved(tmp_path / name, CONFIGS[name]) for name in ("elastic", "fast"))
    model = load_adapter(build(FAMILY), elastic)
    add_adapter(model, fast, "fast")
    alone = values(load_adapter(build(FAMILY), elastic).set_rate(0.15))
    model.set_rate(0.15)
    torch.testing.assert_close(values(model), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, expected, atol=1e-4)
    switch_adapter(model, "fast")
    assert wrapped_schedule(model) == wrapped_schedule(load_adapter(build(FAMILY), fast))
    torch.testing.assert_close(values(switch_adapter(model, "default")), alone, rtol=1e-5, atol=1e-5)


def test_methods_may_differ_as_far_as_peft_lets_them(tmp_path: Path) -> None:
    lora, _ = saved(tmp_path / "lora", CONFIGS["fast"])
    loha, _ = saved(tmp_path / "loha", CONFIGS["slow"], LoHaConfig(r=2))
    model = load_adapter(build(FAMILY), lora)
    before, names = values(model), [name for name, _ in model.named_modules()]
    with pytest.raises((CheckpointError, ConfigError), match="the model is as it was"):
        add_adapter(model, loha, "loha")
    assert torch.equal(values(model), before) and [name for name, _ in model.named_modules()] == names


def state(model: nn.Module) -> tuple[Any, ...]:
    return (
        [n for n, _ in model.named_modules()],
        copy.deepcopy(model.state_dict()),
        list(model.peft_config),
        wrapped_schedule(model),
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[0] == after[0] and before[2:] == after[2:] and before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])


def test_what_cannot_be_added_changes_nothing(tmp_path: Path) -> None:
    first, _ = saved(tmp_path / "first", CONFIGS["slow"])
    good, _ = saved(tmp_path / "good", CONFIGS["late"])
    model = load_adapter(build(FAMILY), first)
    before = state(model)
    damaged = load_file(good / "adapter_model.safetensors")
    damaged.pop(next(key for key in damaged if "lora_A" in key))
    missing = tmp_path / "missing"
    missing.mkdir()
    for file in good.iterdir():
        (missing / file.name).write_bytes(file.read_bytes())
    save_file(damaged, missing / "adapter_model.safetensors")
    bare = tmp_path / "bare"
    save_adapter(adapt(build(FAMILY), pyra=CONFIGS["fast"]), bare)
    prompts, _ = saved(tmp_path / "prompts", None, VisualPromptsConfig(num_prompts=2))
    other = adapt(build(FAMILY, embed_dim=48), pyra=CONFIGS["fast"], peft=LoraConfig())
    save_adapter(other, tmp_path / "wide")
    for folder, error, said in (
        (missing, CheckpointError, "lora_A.*is not in the file"),
        (bare, ConfigError, "trained without a PEFT method"),
        (prompts, ConfigError, "visual prompts change the number of tokens"),
        (tmp_path / "wide", CheckpointError, "backbone of width 48, this one has width 32"),
        (tmp_path / "nowhere", CheckpointError, "nowhere"),
    ):
        with pytest.raises(error, match=said):
            add_adapter(model, folder, "new")
        assert_same(before, state(model))
    with pytest.raises(ConfigError, match="has an adapter 'default' already"):
        add_adapter(model, good, "default")
    with pytest.raises(ConfigError, match="no adapter 'new'; it has default"):
        switch_adapter(model, "new")
    with pytest.raises(ConfigError, match="use load_adapter for the first"):
        add_adapter(build(FAMILY), good, "new")
    with pytest.raises(ConfigError, match="no adapter 'x'; it has none"):
        switch_adapter(build(FAMILY), "x")


def test_a_model_in_evaluation_stays_so_and_frozen(tmp_path: Path) -> None:
    first, _ = saved(tmp_path / "first", CONFIGS["slow"])
    drop, expected = saved(tmp_path / "drop", CONFIGS["fast"], LoraConfig(r=4, lora_dropout=0.5))
    model = add_adapter(load_adapter(build(FAMILY), first), drop, "drop")
    switch_adapter(model, "drop")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(result(run(model, FAMILIES[FAMILY].inputs())), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_in_training_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    fast, _ = saved(tmp_path / "fast", CONFIGS["fast"])
    model = adapt(build(FAMILY), pyra=CONFIGS["late"], peft=LoraConfig()).train()
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    add_adapter(model, fast, "fast")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before
    assert model.training


@pytest.mark.parametrize("switch", ["delete_adapter", "set_adapter"])
def test_what_peft_does_itself_is_put_right_when_saved(switch: str, tmp_path: Path) -> None:
    (slow, _), (fast, expected) = (saved(tmp_path / name, CONFIGS[name]) for name in ("slow", "fast"))
    model = add_adapter(load_adapter(build(FAMILY), slow), fast, "fast")
    if switch == "delete_adapter":
        model.delete_adapter("default")
    else:
        model.set_adapter("fast")
        model.delete_adapter("default")
    save_adapter(model, tmp_path / "again")
    torch.testing.assert_close(values(model), expected, rtol=1e-5, atol=1e-5)
    again = load_adapter(build(FAMILY), tmp_path / "again")
    torch.testing.assert_close(values(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["late", "still", "plain"])
def test_one_that_is_left_alone_again_can_be_saved(name: str, tmp_path: Path) -> None:
    (own, expected), (fast, _) = (saved(tmp_path / each, CONFIGS[each]) for each in (name, "fast"))
    model = add_adapter(load_adapter(build(FAMILY), own), fast, "fast")
    model.delete_adapter("fast")
    save_adapter(model, tmp_path / "again")
    again = load_adapter(build(FAMILY), tmp_path / "again")
    torch.testing.assert_close(values(again), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_reactivation_reads_none(tmp_path: Path) -> None:
    plain, expected = saved(tmp_path / "plain", PyraConfig(rate=0.4, reactivation=False))
    first, _ = saved(tmp_path / "first", CONFIGS["fast"])
    model = add_adapter(load_adapter(build(FAMILY), first), plain, "plain")
    with torch.no_grad():  # what an adapter that is not there falls back to
        for name, parameter in model.named_parameters():
            if "reactivation" in name:
                parameter.normal_()
    torch.testing.assert_close(values(switch_adapter(model, "plain")), expected, rtol=1e-5, atol=1e-5)


def test_biases_that_are_shared_are_refused(tmp_path: Path) -> None:
    biased, _ = saved(tmp_path / "biased", CONFIGS["fast"], LoraConfig(r=2, bias="lora_only"))
    slow, _ = saved(tmp_path / "slow", CONFIGS["slow"])
    for first, second in ((slow, biased), (biased, slow)):
        with pytest.raises(ConfigError, match="trains biases that all adapters share"):
            add_adapter(load_adapter(build(FAMILY), first), second, "second")


def test_configurations_come_back_after_an_error(tmp_path: Path) -> None:
    still, _ = saved(tmp_path / "still", None)
    loha, _ = saved(tmp_path / "loha", CONFIGS["slow"], LoHaConfig(r=2))
    model = load_adapter(build(FAMILY), still)
    before = copy.deepcopy(model.peft_config["default"].__dict__)
    with pytest.raises((CheckpointError, ConfigError)):
        add_adapter(model, loha, "loha")
    assert model.peft_config["default"].__dict__ == before


def test_what_was_unwrapped_stays_so(tmp_path: Path) -> None:
    """Each adapter computes then what it computes on a backbone that merges nothing."""
    folders = {name: saved(tmp_path / name, CONFIGS[name], seed=i)[0] for i, name in enumerate(("slow", "fast"))}
    model = add_adapter(load_adapter(build(FAMILY), folders["slow"]), folders["fast"], "fast")
    unwrap(model)
    for name, folder in (("fast", folders["fast"]), ("default", folders["slow"])):
        switch_adapter(model, name)
        assert wrapped_schedule(model) is None
        torch.testing.assert_close(values(model), values(unwrap(load_adapter(build(FAMILY), folder))))


def test_a_local_adapter_needs_a_grid_when_it_is_added_too(tmp_path: Path) -> None:
    local = saved(tmp_path / "local", PyraConfig(rate=0.2, matching="local"))[0]
    dropping = build(FAMILY, patch_drop_rate=0.25)
    model = adapt(dropping, pyra=PyraConfig(rate=0.1), peft=LoraConfig(r=2))
    with pytest.raises(UnsupportedModelError, match="matching='local' needs a grid"):
        add_adapter(model, local, "local")
    assert list(model.peft_config) == ["default"] and model.pyra_config.rate == 0.1


def test_pefts_own_switch_brings_the_rate(tmp_path: Path) -> None:
    found = {name: saved(tmp_path / name, CONFIGS[name], seed=i) for i, name in enumerate(("slow", "fast", "still"))}
    model = load_adapter(build(FAMILY), found["slow"][0])
    for name in ("fast", "still"):
        add_adapter(model, found[name][0], name)
    for name in ("fast", "default", "still", "fast"):
        model.set_adapter(name)
        torch.testing.assert_close(values(model), found["slow" if name == "default" else name][1])
        assert any(parameter.requires_grad for parameter in model.parameters()), "as PEFT's own"
        switch_adapter(model, name)
        torch.testing.assert_close(values(model), found["slow" if name == "default" else name][1])
    with pytest.raises(ValueError, match="nothing"):
        model.set_adapter("nothing")
