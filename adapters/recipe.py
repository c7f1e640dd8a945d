"""The paper's recipe as one call (arXiv 2403.09192, section 4), and what an optimiser is given."""

from __future__ import annotations

import re
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


def parameter_groups(
    model: nn.Module,
    lr: float,
    reactivation_lr: float,
    *,
    head_lr: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Split what trains in a model: re-activation weights and the head may have learning rates of their own.

    With ``layer_decay`` below 1 the learning rate of all else falls towards the input: layer ``l`` of ``L``, counted
    from 1, gets ``lr * layer_decay ** (L + 1 - l)``, the embeddings are layer 0, and what follows the last layer gets
    ``lr`` (as BEiT and timm do, arXiv 2106.08254).

    Args:
        model: adapted, with or without PEFT layers.
        lr: of everything else.
        reactivation_lr: of ``W_r``, ``W_D`` and their norm.
        head_lr: of the task head; ``lr`` by default.
        layer_decay: factor from a layer to the one before it.

    Returns:
        Groups for a torch optimiser, without empty ones.
    """
    named = [(name, p) for name, p in model.named_parameters()]
    depth = max((number for name, _ in named if (number := _layer(name)) is not None), default=0)
    groups: dict[float, dict[str, list[nn.Parameter]]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if REACTIVATION in parts:
            kind, rate = REACTIVATION, reactivation_lr
        elif any(part in _HEADS for part in parts):
            kind, rate = "head", lr if head_lr is None else head_lr
        else:
            number = _layer(name)
            below = depth + 1 - number if number is not None else depth + 2 if _is_embedding(parts) else 0
            kind, rate = "backbone", lr * layer_decay**below
        shared = "backbone" if kind == "head" and head_lr is None else kind
        groups.setdefault(rate, {}).setdefault(shared, []).append(parameter)
    return [{"params": found, "lr": rate} for rate, kinds in groups.items() for found in kinds.values()]


_HEADS = ("head", "head_dist", "classifier", "score")
_EMBEDDINGS = (
    "patch_embed",
    "pos_embed",
    "cls_token",
    "dist_token",
    "reg_token",
    "norm_pre",
    "embeddings",
    "embed_tokens",
)
_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers?|h)\.(\d+)\.")


def _layer(name: str) -> int | None:
    """Number of the layer that a parameter belongs to, from 0."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _is_embedding(parts: list[str]) -> bool:
    return any(part in _EMBEDDINGS for part in parts)
