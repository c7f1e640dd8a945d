"""A small mixture of experts, and adapters on its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyra.adapters import ExpertLoraConfig, adapt
from pyra.adapters.expert_lora import ExpertLoraLayer
from pyra.backbones import joyai

IDS = torch.randint(2, 512, (2, 12), generator=torch.Generator().manual_seed(1))
SUBSET = {1: [0, 2, 5], 3: [7]}


def make(**changes: Any) -> joyai.JoyAIForCausalLM:
    torch.manual_seed(0)
    return joyai.JoyAIForCausalLM(joyai.tiny_config(initializer_range=0.1, **changes)).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def redrawn(model: nn.Module, std: float = 0.1, adapter: str = "default") -> nn.Module:
    """Give the factors of all adapters new values: they start without an effect."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(base: nn.Module | None = None, **options: Any) -> nn.Module:
    return adapt(make() if base is None else base, peft=ExpertLoraConfig(**{"r": 4, **options})).eval()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ExpertLoraLayer)]


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
