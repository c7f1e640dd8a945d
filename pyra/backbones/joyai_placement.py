"""Where the weights of JoyAI-LLM Flash go: how many bytes each device holds, told before anything is read.

Three plans: ``layers`` puts whole layers on one device after another (``from_pretrained(device_map=...)``), ``fsdp2``
cuts every tensor along its first axis (PyTorch's ``fully_shard``, a layer at a time), ``expert-parallel`` gives every
device a share of the routed experts and a copy of the rest (transformers' ``base_model_ep_plan``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pyra.backbones.joyai import JoyAIConfig, JoyAIForCausalLM, config
from pyra.errors import ConfigError

Plan = Literal["layers", "fsdp2", "expert-parallel"]
PLANS: tuple[Plan, ...] = ("layers", "fsdp2", "expert-parallel")
_EXPERTS = ".mlp.experts."
_BIAS = "e_score_correction_bias"  # float32 in every model


@dataclass(frozen=True)
class Placement:
    """Where weights go.

    Attributes:
        plan: one of :data:`PLANS`.
        weight_bytes: of each device; at the peak ``fsdp2`` gathers ``largest_layer`` bytes besides.
        largest_layer: bytes of the largest decoder layer.
        device_map: of ``layers``: the device of each module, as ``from_pretrained`` takes it; empty otherwise.
    """

    plan: Plan
    weight_bytes: tuple[int, ...]
    largest_layer: int
    device_map: dict[str, int]


def place(
    memory: Sequence[int], *, plan: Plan = "layers", configuration: JoyAIConfig | None = None, dtype: str = "bfloat16"
) -> Placement:
    """Place the weights of a model on devices.

    Args:
        memory: bytes of each device that weights may take; caches and activations need room besides.
        plan: one of :data:`PLANS`.
        configuration: of the model; the published one if None.
        dtype: of the weights, a name of torch.

    Raises:
        ConfigError: where they do not fit: says what they take and what there is; for an unknown plan or dtype, or a
            number of devices that does not divide the experts.

    >>> sum(place([140 * 10**9]).weight_bytes)
    97885105152
    """
    configuration = config() if configuration is None else configuration
    if plan not in PLANS:
        raise ConfigError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype must be a name of torch, such as bfloat16, got {dtype!r}")
    if not memory or min(memory) < 1:
        raise ConfigError(f"memory must name the bytes of one device or more, got {list(memory)}")
    with torch.device("meta"):
        model = JoyAIForCausalLM(configuration)
    width = getattr(torch, dtype).itemsize
    if plan == "layers":
        return _by_layers(model, memory, width)
    devices = len(memory)
    if plan == "expert-parallel" and configuration.n_routed_experts % devices:
        raise ConfigError(f"{configuration.n_routed_experts} experts cannot be shared out equally to {devices} devices")
    held = sum(
        (4 if _BIAS in name else width)
        * (
            math.ceil(value.shape[0] / devices) * value[0].numel()
            if plan == "fsdp2" or _EXPERTS in name
            else value.numel()
        )
        for name, value in model.state_dict(keep_vars=True).items()
    )
    largest = max(_bytes(layer, width) for layer in model.model.layers)
    gathered = largest if plan == "fsdp2" and devices > 1 else 0
    if held + gathered > min(memory):
        raise ConfigError(
            f"{plan} takes {_gb(held + gathered)} of weights on each of {devices} devices, the smallest has "
            f"{_gb(min(memory))}: take more devices, or fewer experts (pyra.experts)"
        )
    return Placement(plan, (held,) * devices, largest, {})


def _by_layers(model: JoyAIForCausalLM, memory: Sequence[int], width: int) -> Placement:
    """Fill devices in the order of the forward, each as far as all need it: no device is fuller than it must be."""
    parts: list[tuple[str, int]] = [("model.embed_tokens", _bytes(model.model.embed_tokens, width))]
    parts += [(f"model.layers.{index}", _bytes(layer, width)) for index, layer in enumerate(model.model.layers)]
    parts += [("model.norm", _bytes(model.model.norm, width)), ("model.rotary_emb", 0)]
    parts += [("lm_head", _bytes(model.lm_head, width))]
    whole = sum(size for _, size in parts)
    # The smallest share of every device's memory with which all parts find a place.
    low, high = 0.0, 1.0
    best = _filled(parts, memory, high)
    if best is None:
        raise ConfigError(
            f"the weights take {_gb(whole)}, whole layers of up to {_gb(max(size for _, size in parts))}; they do not "
            f"fit into {', '.join(map(_gb, memory))}: take more devices, or fewer experts (pyra.experts)"
        )
    for _ in range(30):
        middle = (low + high) / 2
        found = _filled(parts, memory, middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    sizes = dict(parts)
    held = tuple(sum(sizes[name] for name, at in best.items() if at == device) for device in range(len(memory)))
    return Placement("layers", held, max(size for name, size in parts if ".layers." in name), best)


def _filled(parts: Sequence[tuple[str, int]], memory: Sequence[int], share: float) -> dict[str, int] | None:
    """Put parts on devices in order, up to a share of their memory; None where some are left over."""
    device, used, placed = 0, 0, {}
    for name, size in parts:
        while device < len(memory) and used + size > share * memory[device]:
            device, used = device + 1, 0
        if device == len(memory):
            return None
        placed[name], used = device, used + size
    return placed


def _bytes(module: nn.Module, width: int) -> int:
    held = module.state_dict(keep_vars=True).items()
    return sum(value.numel() * (4 if _BIAS in name else width) for name, value in held)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
