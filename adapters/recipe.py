"""The paper's recipe as one call (arXiv 2403.09192, section 4), and what an optimiser is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from pyra.adapters.bottleneck import BottleneckConfig
from pyra.adapters.targets import REACTIVATION
from pyra.config import PyraConfig
from pyra.errors import ConfigError

# Rank of LoRA, and width of the bottleneck adapter, by the width of the backbone.
_RANKS = {"tiny": 4, "small": 4, "base": 8, "large": 12}
METHODS: tuple[str, ...] = ("lora", "bottleneck")


@dataclass(frozen=True)
class Recipe:
    """What the paper trains with.

    Attributes:
        pyra: what merges.
        peft: the adapter.
        arguments: for ``transformers.TrainingArguments(output_dir, **arguments)``: 100 epochs of batch 32, cosine from
            1e-3 to 1e-5 after 10 epochs of warm-up from 1e-6, no mixed precision.
        lr: learning rate of everything but the re-activation weights.
        reactivation_lr: theirs; the paper picks it for each task from 1e-5 to 3e-3.
        weight_decay: decoupled.
        model: for ``timm.create_model(name, **model)``.
    """

    pyra: PyraConfig
    peft: PeftConfig
    arguments: dict[str, Any]
    lr: float = 1e-3
    reactivation_lr: float = 1e-3
    weight_decay: float = 1e-4
    model: dict[str, Any] = field(default_factory=lambda: {"drop_path_rate": 0.1})

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Return AdamW over what trains in a model from :func:`pyra.adapters.adapt`; give it to the Trainer."""
        groups = parameter_groups(model, self.lr, self.reactivation_lr)
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)


def paper_recipe(backbone: str, level: str, *, method: str = "lora", reactivation_lr: float = 1e-3) -> Recipe:
    """Return the configuration, adapter, training arguments and optimiser of the paper's experiments.

    Args:
        backbone: timm name of one of the paper's models, such as ``vit_base_patch16_224``.
        level: ``"low"`` or ``"high"``.
        method: ``"lora"`` on the fused qkv, or ``"bottleneck"``, the adapter after each MLP.
        reactivation_lr: learning rate of the re-activation weights; the paper tries 1e-5 to 3e-3.

    Raises:
        ScheduleError: where the paper has no such schedule.
        ConfigError: for another method, or a learning rate that is not positive.

    Example:
        >>> recipe = paper_recipe("vit_base_patch16_224", "high")
        >>> recipe.peft.r, recipe.arguments["num_train_epochs"]
        (8, 100)
    """
    pyra = PyraConfig.paper(backbone, level)
    problems = []
    if method not in METHODS:
        problems.append(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not reactivation_lr > 0:
        problems.append(f"reactivation_lr must be positive, got {reactivation_lr}")
    if problems:
        raise ConfigError("paper_recipe: " + "; ".join(problems))
    rank = next(rank for size, rank in _RANKS.items() if f"_{size}_" in backbone)
    made: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.1, target_modules=["qkv"]),
        "bottleneck": lambda: BottleneckConfig(width=rank),
    }
    arguments = {
        "num_train_epochs": 100,
        "per_device_train_batch_size": 32,
        "dataloader_drop_last": True,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 1e-2, "warmup_lr_rate": 1e-3},
        "warmup_steps": 0.1,  # a share of all steps: 10 epochs
        "remove_unused_columns": False,
    }
    return Recipe(pyra, made[method](), arguments, reactivation_lr=reactivation_lr)


def parameter_groups(model: nn.Module, lr: float, reactivation_lr: float) -> list[dict[str, Any]]:
    """Split what trains in a model: re-activation weights have a learning rate of their own.

    Args:
        model: adapted, with or without PEFT layers.
        lr: of everything else.
        reactivation_lr: of ``W_r``, ``W_D`` and their norm.

    Returns:
        Groups for a torch optimiser, without empty ones.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[REACTIVATION in name.split(".")].append(parameter)
    named = [{"params": groups[False], "lr": lr}, {"params": groups[True], "lr": reactivation_lr}]
    return [group for group in named if group["params"]]
