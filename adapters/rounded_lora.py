"""LoRA on linear layers that train as they will be rounded (:func:`pyra.export.linear_training.fake_quantise_linear`).

What is deployed is the weight with the adapter folded into it, rounded: ``round(W + s B A)``. So that is what the
forward uses, too, and not ``round(W) + s B A``, which folding would round once more. ``W`` [out, in], ``A`` [r, in],
``B`` [out, r], ``s`` the scaling; gradients go through the rounding to ``A`` and ``B`` as torchao has it for weights.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.adapters.starts import changes_weights
from pyra.errors import ConfigError
from pyra.export.linear_training import is_rounded, trains_as_rounded

_PLAIN_STARTS = (True, False, "gaussian")  # of the factors alone


class RoundedLora(Linear):
    """LoRA of peft around a rounded layer.

    Modifications: the forward rounds the weight that folding makes, to the bit. Where the layer inside is an ordinary
    one again (``undo_fake_quantise_linear``), the forward is peft's.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; raises :class:`ConfigError` for a variant of LoRA, such as DoRA."""
        super().update_layer(adapter_name, *args, **kwargs)
        if adapter_name in self.lora_variant:
            kind = type(self.lora_variant[adapter_name]).__name__.removesuffix("LinearVariant")
            raise ConfigError(f"layers that train as they will be rounded take plain LoRA, not {kind}: {_INSTEAD}")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with the adapters that are active in its weight: [..., in] to [..., out]."""
        layer: Any = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not is_rounded(layer) or self.disable_adapters or self.merged or not names:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("layers that train as they will be rounded take no adapter_names: run a batch an adapter")
        return F.linear(x, layer.weight_fake_quantizer(self._folded(layer.weight, names)), layer.bias)

    def _folded(self, weight: Tensor, names: list[str]) -> Tensor:
        """Return the weight that ``merge`` makes, with gradients to the factors."""
        folded = weight
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                folded = (folded + self.get_delta_weight(name)).to(weight.dtype)
        return folded


_INSTEAD = "take LoraConfig(lora_dropout=0) as it is, or train all weights"


def round_with_adapter(model: nn.Module, config: Any) -> None:
    """Have an adapter that is about to be attached rounded with the weights (its ``config`` is changed in place).

    A model that does not train as it will be rounded is left as it is.

    Raises:
        ConfigError: for a method or an option that does not fold into weights before they are rounded.
    """
    if not trains_as_rounded(model):
        return
    if problem := _problem(config):
        raise ConfigError(f"layers that train as they will be rounded take plain LoRA, not {problem}: {_INSTEAD}")
    kinds = {type(module) for module in model.modules() if is_rounded(module)}
    config._register_custom_module(dict.fromkeys(kinds, RoundedLora))


def _problem(config: Any) -> str | None:
    if type(config) is not LoraConfig:
        return type(config).__name__
    if changes_weights(config) or config.init_lora_weights not in _PLAIN_STARTS:
        return f"init_lora_weights={config.init_lora_weights!r}"
    unfit = {
        "lora_dropout": config.lora_dropout,
        "bias": config.bias != "none" and config.bias,
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_parameters": config.target_parameters,
    }
    return next((f"{name}={value!r}" for name, value in unfit.items() if value), None)
