"""The paper's recipe (arXiv 2403.09192, section 4): its numbers, and that an optimiser really gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from pyra.adapters import BottleneckConfig, adapt, paper_recipe
from pyra.errors import ConfigError, ScheduleError


@pytest.mark.parametrize(
    ("backbone", "rank"),
    [("vit_base_patch16_224", 8), ("vit_large_patch16_224", 12), ("deit_base_distilled_patch16_224", 8)],
)
@pytest.mark.parametrize("level", ["low", "high"])
def test_ranks_and_schedules(backbone: str, rank: int, level: str) -> None:
    recipe = paper_recipe(backbone, level)
    assert recipe.peft.r == rank == recipe.peft.lora_alpha and recipe.peft.lora_dropout == 0.1
    assert (
        recipe.pyra.schedule[0] == {"low": {12: 16, 24: 8}, "high": {12: 40, 24: 20}}[level][len(recipe.pyra.schedule)]
    )
    narrow = paper_recipe(backbone, level, method="bottleneck").peft
    assert isinstance(narrow, BottleneckConfig) and narrow.width == rank


def test_trained_parameters_are_those_of_the_paper() -> None:
    """27,840 re-activation parameters on ViT-B at the high schedule."""
    recipe = paper_recipe("vit_base_patch16_224", "high")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", **recipe.model)
    adapted = adapt(model, pyra=recipe.pyra, peft=recipe.peft)
    counts = [p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "reactivation" in n]
    assert sum(counts) == 27_840


def test_learning_rates_over_a_training(tmp_path: Path) -> None:
    recipe = paper_recipe("vit_base_patch16_224", "high", reactivation_lr=3e-3)
    model = adapt(
        timm.create_model("vit_tiny_patch16_224", num_classes=3, **recipe.model), pyra=recipe.pyra, peft=recipe.peft
    )
    optimizer = recipe.optimizer(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain, own = optimizer.param_groups
    assert all("reactivation" in names[id(p)] for p in own["params"]) and len(own["params"]) == 4 * 12
    assert not any("reactivation" in names[id(p)] for p in plain["params"])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **recipe.arguments)
    trainer = Trainer(model=model, args=arguments, optimizers=(optimizer, None))
    scheduler, rates = trainer.create_scheduler(num_training_steps=1000, optimizer=optimizer), []
    for _ in range(1000):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx([1e-6, 3e-6]) and rates[99] == pytest.approx([1e-3, 3e-3], rel=1e-3)
    assert rates[999] == pytest.approx([1e-5, 3e-5], rel=2e-2)
    assert max(rate for rate, _ in rates) == pytest.approx(1e-3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_a_step_moves_each_group_by_its_own_rate() -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    recipe = paper_recipe("vit_base_patch16_224", "high", reactivation_lr=5e-3)
    model = adapt(timm.create_model("vit_tiny_patch16_224", num_classes=3), pyra=recipe.pyra, peft=recipe.peft)
    optimizer = recipe.optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    moved = {name: float((p - before[name]).abs().max()) for name, p in model.named_parameters() if name in before}
    channel = next(value for name, value in moved.items() if "blocks.0" in name and "channel_weight" in name)
    assert channel == pytest.approx(5e-3, rel=1e-2)
    assert moved["base_model.model.head.modules_to_save.default.bias"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("vit_small_patch16_224", "high"), ScheduleError, "no published schedule for 'vit_small_patch16_224'"),
        (("vit_base_patch16_224", "highest"), ScheduleError, "highest"),
    ],
)
def test_what_the_paper_does_not_have(arguments: tuple[str, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        paper_recipe(*arguments)
    with pytest.raises(
        ConfigError, match="method must be one of lora, bottleneck, got 'dora'; reactivation_lr must be"
    ):
        paper_recipe("vit_base_patch16_224", "high", method="dora", reactivation_lr=0)
