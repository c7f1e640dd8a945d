"""LoRA that starts from a part of the weights (PiSSA, OLoRA, CorDA, LoRA-GA), saved as plain LoRA.

These starts move a part ``s B0 A0`` of a weight ``W`` into the adapter and leave ``W - s B0 A0`` behind. A backbone
that the adapter is loaded into has ``W``, and decomposing it once more gives the same start only where nothing is drawn
at random and nothing rounds differently. What the training added needs no start:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

so the folder holds plain LoRA of twice the rank. ``A`` [r, in], ``B`` [out, r], ``s`` the scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyra.files import read_json, write_json

_STARTS = ("pissa", "olora", "corda", "lora_ga")
_START = "pyra_start"


def changes_weights(config: PeftConfig) -> bool:
    """Whether attaching a method changes the weights it attaches to."""
    start = getattr(config, "init_lora_weights", None) if isinstance(config, LoraConfig) else None
    return isinstance(start, str) and start.lower().startswith(_STARTS)


def remember_start(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Keep ``A0`` and ``B0`` of a fresh adapter beside it, from its state dict."""
    start = {key: tensor.detach().clone() for key, tensor in state.items() if ".lora_A." in key or ".lora_B." in key}
    setattr(model.base_model, _START, start)


def save_as_plain_lora(model: PeftModel, weights: Path, config: Path) -> None:
    """Rewrite the two files that PEFT has written, where the start of the adapter is known."""
    start: dict[str, Tensor] = getattr(model.base_model, _START, {})
    if not start:
        return
    state = load_file(weights)
    for key, first in start.items():
        first = first.to(state[key])
        if ".lora_A." in key:
            state[key] = torch.cat([state[key], first], dim=0)
        elif key.endswith(".weight"):
            state[key] = torch.cat([state[key], -first], dim=1)
    save_file(state, weights, metadata={"format": "pt"})
    write_json(config, _twice_the_rank(read_json(config)))


def _twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Return a LoRA configuration of twice the rank and the same scaling: alpha / rank, or alpha / sqrt(rank)."""
    factor = 2**0.5 if config["use_rslora"] else 2
    return {
        **config,
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (config["alpha_pattern"] or {}).items()},
        "corda_config": None,
        "lora_ga_config": None,
    }
