"""Checkpoints of the published PYRA code (arXiv 2403.09192), read onto a wrapped timm model.

| published name | here |
|---|---|
| ``blocks.i.attn.LoRA_a`` / ``LoRA_b`` | LoRA on ``blocks.i.attn.qkv`` (rank from the tensor, no scaling) |
| ``blocks.i.adapter.ln1`` / ``ln2`` | bottleneck adapter after ``blocks.i.mlp`` |
| ``blocks.i.pyra_a`` / ``pyra_b`` / ``pyra_norm`` | ``reactivation.pair_weight`` / ``channel_weight`` / ``norm`` |
| everything else | the same name in timm |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from pyra.adapters.bottleneck import BottleneckConfig
from pyra.checkpoints import read_state_dict, value_problems
from pyra.errors import CheckpointError

_RENAMED = (
    (re.compile(r"\.pyra_a$"), ".reactivation.pair_weight"),
    (re.compile(r"\.pyra_b$"), ".reactivation.channel_weight"),
    (re.compile(r"\.pyra_norm\."), ".reactivation.norm."),
    (re.compile(r"\.attn\.LoRA_a\."), ".attn.qkv.lora_A.default."),
    (re.compile(r"\.attn\.LoRA_b\."), ".attn.qkv.lora_B.default."),
    (re.compile(r"\.adapter\.ln1\."), ".mlp.bottleneck_layers.default.down."),
    (re.compile(r"\.adapter\.ln2\."), ".mlp.bottleneck_layers.default.up."),
)
_MATRIX = re.compile(r"\.(LoRA_a|LoRA_b|adapter\.ln1|adapter\.ln2)\.weight$")


def load_published_checkpoint(model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load published weights, adapters included, onto a wrapped timm model.

    Args:
        model: a timm VisionTransformer wrapped with the checkpoint's schedule (changed in place).
        path_or_state_dict: a ``.safetensors``, ``.pth`` or ``.npz`` file, or its tensors. A file that holds only what
            was trained (adapter, re-activation, head) is laid over the weights the model has.

    Returns:
        ``model`` with LoRA or bottleneck layers injected where the checkpoint has them (a plain module, not a
        ``PeftModel``); LoRA, bottleneck, re-activation and head weights are trainable, the rest is frozen.

    Raises:
        CheckpointError: for tensors that have no place in the model or do not fit, all named.
    """
    if isinstance(path_or_state_dict, (str, Path)):
        state = read_state_dict(path_or_state_dict)
    else:
        state = dict(path_or_state_dict)
    if not state:
        raise CheckpointError("the checkpoint holds no tensors")
    problems = value_problems({key: tensor for key, tensor in state.items() if tensor.numel()})
    problems += [
        f"{key} is {list(tensor.shape)}, a matrix is needed"
        for key, tensor in state.items()
        if _MATRIX.search(key) and tensor.ndim != 2
    ]
    if problems:
        raise CheckpointError("the checkpoint cannot be used: " + "; ".join(problems[:8]))
    config = _adapter_config(state)
    if config is not None:
        model = inject_adapter_in_model(config, model)
    own = model.state_dict()
    renamed = {_own_name(key, own): tensor for key, tensor in state.items()}
    # A layer that removes no token may have an empty W_r in the file, and has no module here.
    placeless = [key for key, tensor in renamed.items() if key not in own and tensor.numel()]
    problems = [f"{key} has no place in the model" for key in placeless]
    # What was trained comes as a whole: half of it would leave random weights in the rest.
    adapted = ("lora_", "bottleneck_", ".reactivation.")
    problems += [
        f"{key} is not in the checkpoint" for key in own if key not in renamed and any(part in key for part in adapted)
    ]
    problems += [
        f"{key} is {list(tensor.shape)}, the model has {list(own[key].shape)}"
        for key, tensor in renamed.items()
        if key in own and own[key].shape != tensor.shape
    ]
    # Full checkpoints must be complete; files with the trained weights alone need only those.
    if any(key.startswith("patch_embed.") for key in renamed):
        problems += [
            f"{key} is not in the checkpoint"
            for key in own
            if key not in renamed and not any(part in key for part in adapted)
        ]
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit: " + "; ".join(problems) + " (is the model wrapped with the same schedule?)"
        )
    with torch.no_grad():
        for key, tensor in renamed.items():
            if key in own:
                own[key].copy_(tensor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head") or any(part in name for part in adapted))
    return model


def _adapter_config(state: Mapping[str, Tensor]) -> PeftConfig | None:
    ranks = {tensor.shape[0] for key, tensor in state.items() if ".LoRA_a." in key}
    widths = {tensor.shape[0] for key, tensor in state.items() if ".adapter.ln1.weight" in key}
    if len(ranks) > 1 or len(widths) > 1:
        raise CheckpointError(f"the checkpoint mixes LoRA ranks {sorted(ranks)} or adapter widths {sorted(widths)}")
    if ranks and widths:
        raise CheckpointError(
            "the checkpoint holds both LoRA and bottleneck weights; the published code has one of them"
        )
    if ranks:
        rank = ranks.pop()
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"])
    return BottleneckConfig(width=widths.pop(), target_modules=["mlp"]) if widths else None


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    """Translate a published name; a module under a PEFT layer is its ``base_layer``."""
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    if key in own:
        return key
    parts = key.split(".")
    for position in range(len(parts) - 1, 0, -1):
        under = ".".join([*parts[:position], "base_layer", *parts[position:]])
        if under in own:
            return under
    return key
