"""Odd arguments: one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbone_families import build, config

from pyra.adapters import (
    VisualPromptsConfig,
    adapt,
    add_adapter,
    fold_adapter,
    load_adapter,
    push_adapter,
    save_adapter,
)
from pyra.adapters.adalora import RankAllocation
from pyra.adapters.elastic import RateSampler
from pyra.adapters.methods import peft_config
from pyra.errors import ConfigError


def lora() -> Any:
    return adapt(build("timm-vit"), pyra=config(), peft=peft.LoraConfig(r=2))


@pytest.mark.parametrize("folder", [None, 3, ["a"], b"a"])
def test_no_folder(folder: Any) -> None:
    with pytest.raises(ConfigError, match="an adapter is a folder, or 'owner/name'"):
        load_adapter(build("timm-vit"), folder)
    with pytest.raises(ConfigError, match="an adapter is a folder, or 'owner/name'"):
        add_adapter(lora(), folder, "more")
    with pytest.raises(ConfigError, match="save_adapter writes a folder"):
        save_adapter(lora(), folder)


def test_no_names(tmp_path: Path) -> None:
    save_adapter(lora(), tmp_path / "a")
    for name in ("modules_to_save", "", "a.b", None, 3, "a b"):
        model = lora()
        with pytest.raises(ConfigError, match="an adapter is called by a word of letters, digits and _"):
            add_adapter(model, tmp_path / "a", name)  # type: ignore[arg-type]
        assert list(model.peft_config) == ["default"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="save_adapter writes a folder"):
        save_adapter(lora(), tmp_path / "file")
    with pytest.raises(ConfigError, match="'owner/name'"):
        load_adapter(build("timm-vit"), "me/mine", revision=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'owner/name'"):
        push_adapter(lora(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompts", None])
def test_a_loaded_adapter_goes_on_training_where_it_is_asked_for(method: str | None, tmp_path: Path) -> None:
    made = adapt(build("timm-vit"), pyra=config(), peft=None if method is None else peft_config(method, 2))
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    save_adapter(made, tmp_path)
    frozen = load_adapter(build("timm-vit"), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    loaded = load_adapter(build("timm-vit"), tmp_path, is_trainable=True)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    assert not loaded.training


def test_a_backbone_takes_one_adapter_to_load(tmp_path: Path) -> None:
    save_adapter(lora(), tmp_path)
    base = build("timm-vit")
    load_adapter(base, tmp_path)
    with pytest.raises(ConfigError, match="already carries an adapter"):
        load_adapter(base, tmp_path)


def test_a_sampler_takes_rates() -> None:
    with pytest.raises(ConfigError, match=r"two rates, such as \[0.3, 0.8\], got PeftModel"):
        RateSampler(lora())


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8", True])
def test_no_ranks(rank: Any) -> None:
    for method in ("lora", "vera", "oft", "boft", "adalora"):
        with pytest.raises(ConfigError, match="rank must be a whole number"):
            peft_config(method, rank)


def test_a_block_that_does_not_divide_is_not_replaced_in_silence() -> None:
    base = build("timm-vit")
    with pytest.raises(ConfigError, match=r"oft_block_size 7 does not divide .* peft would take 8 instead"):
        adapt(base, peft=peft_config("oft", 7))
    assert adapt(base, peft=peft_config("oft", 8))


@pytest.mark.parametrize("steps", [0, 1])
def test_adalora_needs_steps(steps: int) -> None:
    model = adapt(build("timm-vit"), peft=peft_config("adalora", 2))
    with pytest.raises(ConfigError, match="AdaLoRA needs two training steps at least"):
        RankAllocation.of(model, steps)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_leave_the_batch_open_in_an_export(deep: bool) -> None:
    model = fold_adapter(adapt(build("timm-vit"), pyra=config(), peft=VisualPromptsConfig(num_prompts=2, deep=deep)))
    pixels = torch.randn(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model.eval(), (pixels,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for count in (1, 2, 3):
            torch.testing.assert_close(exported(pixels[:count]), model(pixels[:count]))
