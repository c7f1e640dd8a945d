"""What INT4 rounds of a language model, how, and what ``quantization_config`` tells engines of it (compressed-tensors).

Of JoyAI and DeepSeek-V3 it is the routed experts, as :mod:`pyra.experts.quantising` has it; of dense decoders of the
Llama type the linear layers of the blocks, as :mod:`pyra.export.linear_training` trains them. All else stays float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.layers import expert_layers
from pyra.experts.quantising import STACKS, QuantisingConfig, fitting_group, refuse_unfit, rounded, was_rounded
from pyra.export.engine_config import family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.export.linear_training import GROUP, LINEAR, linear_layers

BESIDE_EXPERTS = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.gate$",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj$",
    "re:.*eh_proj$",
)
"""Every linear layer but those of routed experts, as ``quantization_config`` names them."""


@dataclass(frozen=True)
class Rounding:
    """Which weights become integers.

    Attributes:
        config: how they are rounded.
        weights: their names in the model's state: stacks of experts, or weights of linear layers.
        ignored: linear layers that stay float, as ``quantization_config`` names them.
        notes: what a user should know.
    """

    config: QuantisingConfig
    weights: frozenset[str]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def int4_rounding(model: nn.Module, group: int | None = None) -> Rounding:
    """Return what INT4 rounds of a model that engines read.

    Args:
        model: folded, nothing merging, in float.
        group: inputs that share a scale in routed experts; None takes the largest of 64, 32, 16 and 8 that divides
            their widths. Linear layers have groups of 32.

    Raises:
        UnsupportedModelError: for a model with nothing to round.
        ConfigError: where the group does not divide the experts' widths, or what is to be rounded was rounded already.
    """
    return _of_experts(model, group) if family_of(model) == DEEPSEEK else _of_linear_layers(model)


def rounded_experts(model: nn.Module, config: QuantisingConfig) -> Rounding:
    """Return the rounding of a model's routed experts, which were found to fit it."""
    names = frozenset(f"{name}.experts.{stack}" for name in expert_layers(model) for stack in STACKS)
    return Rounding(config, names, BESIDE_EXPERTS)


@contextmanager
def rounded_weights(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Have a model compute with its rounded weights within the block; the float ones come back after it."""
    parameters = [model.get_parameter(name) for name in rounding.weights]
    floats = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = rounded(parameter.data, rounding.config)
        yield
    finally:
        for parameter, data in zip(parameters, floats, strict=True):
            parameter.data = data


def _of_experts(model: nn.Module, group: int | None) -> Rounding:
    config = QuantisingConfig(group_size=fitting_group(model) if group is None else group)
    refuse_unfit(model, config)
    return rounded_experts(model, config)


def _of_linear_layers(model: nn.Module) -> Rounding:
    layers, left = linear_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layers of a multiple of {GROUP} inputs that could be rounded"
        )
    name = next((name for name, layer in layers.items() if was_rounded(layer.weight, LINEAR)), None)
    if name is not None:
        raise ConfigError(
            f"{name} holds a weight that was rounded to 4 bits already, and rounding it again moves it: open the float "
            "checkpoint that it was made from"
        )
    notes = [f"{len(left)} layers stay float, since groups of {GROUP} do not divide their inputs: {_some(left)}"]
    return Rounding(
        LINEAR, frozenset(f"{name}.weight" for name in layers), ("lm_head", *left), tuple(notes if left else ())
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def quantization_config(rounding: Rounding) -> dict[str, Any]:
    """Return what ``config.json`` says of the rounded weights, in the words of compressed-tensors."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": rounding.config.group_size,
        "dynamic": False,
        "observer": "minmax",
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": "pack-quantized"}},
        "ignore": list(rounding.ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
