"""The PEFT methods that runs are made with, by name."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftConfig

from pyra.adapters.bottleneck import BottleneckConfig
from pyra.errors import ConfigError, did_you_mean

PEFT_METHODS = ("lora", "bottleneck")


def peft_config(method: str, rank: int, dropout: float = 0.0, targets: Sequence[str] | None = None) -> PeftConfig:
    """Return the configuration of a PEFT method as the paper uses it (arXiv 2403.09192, section 4).

    Args:
        method: ``"lora"`` (update not scaled) or ``"bottleneck"`` (after each MLP).
        rank: rank of LoRA, width of the bottleneck.
        dropout: dropout in the adapter.
        targets: modules that LoRA adapts; None means the projections to queries, keys and values, as in the paper.

    Raises:
        ConfigError: for another method.
    """
    if method == "lora":
        names = None if targets is None else list(targets)
        return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=names)
    if method == "bottleneck":
        return BottleneckConfig(width=rank, dropout=dropout)
    raise ConfigError(
        f"unknown PEFT method {method!r}{did_you_mean(method, PEFT_METHODS)}; one of {', '.join(PEFT_METHODS)}"
    )
