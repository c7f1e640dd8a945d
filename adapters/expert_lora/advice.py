"""What stock LoRA on experts costs, said before it is attached."""

from __future__ import annotations

import warnings
from collections import defaultdict

from peft import LoraConfig, PeftConfig
from torch import nn

from pyra.adapters.expert_lora.config import ExpertLoraConfig
from pyra.adapters.expert_lora.model import expert_targets

LARGE = 256 * 2**20
"""Bytes of the stacks that ``target_parameters`` names in one layer from which on a warning says what they cost."""


def warn_of_rebuilt_stacks(model: nn.Module, config: PeftConfig) -> None:
    """Warn where ``target_parameters`` of LoRA names large stacks of experts: peft makes them anew in every forward."""
    if not isinstance(config, LoraConfig) or isinstance(config, ExpertLoraConfig):
        return
    layers: defaultdict[str, int] = defaultdict(int)
    trained = 0
    for name, stack in expert_targets(model, config).items():
        layers[name.rpartition(".")[0]] += stack.numel() * stack.element_size()
        trained += 4 * config.r * stack.shape[0] * sum(stack.shape[1:])  # in float32, as peft trains adapters
    if layers and max(layers.values()) > LARGE:
        rebuilt = f"{_size(sum(layers.values()))} in every forward ({_size(max(layers.values()))} a layer)"
        warnings.warn(
            f"target_parameters names stacks of experts: peft adds the update to whole stacks, {rebuilt}, and trains "
            f"{_size(trained)} of factors for all experts; ExpertLoraConfig of pyra.adapters sends only tokens through "
            "the factors, of the experts that you name",
            stacklevel=4,
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
