"""The PEFT methods that runs are made with, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
from peft import LoraConfig, PeftConfig

from pyra.adapters.bottleneck import BottleneckConfig
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.errors import ConfigError, did_you_mean

_Make = Callable[[int, float, "list[str] | None"], PeftConfig]


def _lora(**changes: Any) -> _Make:
    """LoRA whose update is not scaled, as the paper has it."""
    return lambda rank, dropout, targets: LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=targets, **changes
    )


def _adalora(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
    # The number of steps is known where the training begins (pyra.adapters.adalora).
    return peft.AdaLoraConfig(
        init_r=max(rank * 3 // 2, rank + 1),
        target_r=rank,
        lora_alpha=rank,
        lora_dropout=dropout,
        target_modules=targets,
        total_step=1,
    )


def _ia3(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
    return peft.IA3Config(target_modules=targets, feedforward_modules=None if targets is None else [])


_METHODS: dict[str, tuple[str, _Make]] = {
    "lora": ("LoRA", _lora()),
    "dora": ("LoRA with magnitudes of its own (DoRA)", _lora(use_dora=True)),
    "rslora": ("LoRA divided by the root of its rank", _lora(use_rslora=True)),
    "pissa": ("LoRA that starts at the largest singular values", _lora(init_lora_weights="pissa")),
    "adalora": ("LoRA whose ranks move to where they help (it starts at 1.5 times --rank)", _adalora),
    "ia3": ("(IA)3, learned factors", _ia3),
    "vera": (
        "VeRA, learned factors around shared random matrices",
        lambda rank, dropout, targets: peft.VeraConfig(r=rank, vera_dropout=dropout, target_modules=targets),
    ),
    "oft": (
        "OFT, rotations in blocks of --rank",
        lambda rank, dropout, targets: peft.OFTConfig(
            oft_block_size=rank, module_dropout=dropout, target_modules=targets
        ),
    ),
    "boft": (
        "BOFT, rotations in butterflies of --rank",
        lambda rank, dropout, targets: peft.BOFTConfig(
            boft_block_size=rank, boft_dropout=dropout, target_modules=targets
        ),
    ),
    "loha": (
        "LoHa, Hadamard products",
        lambda rank, dropout, targets: peft.LoHaConfig(
            r=rank, alpha=rank, module_dropout=dropout, target_modules=targets
        ),
    ),
    "lokr": (
        "LoKr, Kronecker products",
        lambda rank, dropout, targets: peft.LoKrConfig(
            r=rank, alpha=rank, module_dropout=dropout, target_modules=targets
        ),
    ),
    "fourierft": (
        "FourierFT, 125 frequencies a rank",
        lambda rank, dropout, targets: peft.FourierFTConfig(
            n_frequency=125 * rank, scaling=300.0, target_modules=targets
        ),
    ),
    "ln-tuning": ("the norms alone", lambda rank, dropout, targets: peft.LNTuningConfig()),
    "bottleneck": (
        "bottleneck adapter after each MLP",
        lambda rank, dropout, targets: BottleneckConfig(width=rank, dropout=dropout),
    ),
    "adaptformer": (
        "bottleneck adapter beside each MLP",
        lambda rank, dropout, targets: BottleneckConfig(width=rank, dropout=dropout, placement="parallel", scale=0.1),
    ),
    "prompts": (
        "--rank visual prompts for each layer",
        lambda rank, dropout, targets: VisualPromptsConfig(num_prompts=rank, dropout=dropout),
    ),
    "prompts-shallow": (
        "--rank visual prompts before the first layer",
        lambda rank, dropout, targets: VisualPromptsConfig(num_prompts=rank, dropout=dropout, deep=False),
    ),
}
PEFT_METHODS: dict[str, str] = {name: text for name, (text, _) in _METHODS.items()}
"""Names that :func:`peft_config` takes, and what each is."""


def peft_config(method: str, rank: int, dropout: float = 0.0, targets: Sequence[str] | None = None) -> PeftConfig:
    """Return the configuration of a PEFT method; LoRA and bottleneck are as the paper has them (arXiv 2403.09192, 4).

    Args:
        method: one of :data:`PEFT_METHODS`.
        rank: the size of the adapter: rank of LoRA and its kin, width of a bottleneck, block of a rotation, number of
            prompts. (IA)3 and norm tuning have none.
        dropout: dropout in the adapter, where the method knows one.
        targets: modules that are adapted; None means the projections to queries, keys and values, as in the paper.
            Bottlenecks, prompts and norm tuning have their own places.

    Raises:
        ConfigError: for another method.

    Example:
        >>> peft_config("dora", rank=8).use_dora
        True
    """
    if method not in _METHODS:
        close = did_you_mean(method, _METHODS)
        raise ConfigError(f"unknown PEFT method {method!r}{close}; one of {', '.join(_METHODS)}")
    return _METHODS[method][1](rank, dropout, None if targets is None else list(targets))
