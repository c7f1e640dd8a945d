"""The layers of a model that have routed experts, as transformers builds DeepSeek-V3's and its relatives'."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyra.errors import UnsupportedModelError

_STACKED = ("gate_up_proj", "down_proj", "num_experts")
_ROUTER = ("weight", "top_k", "num_experts")


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """Return the mixtures of a model by name: modules with stacked ``experts`` and a router ``gate``.

    Raises:
        UnsupportedModelError: for a model that has none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if _has(getattr(module, "experts", None), _STACKED) and _has(getattr(module, "gate", None), _ROUTER)
    }
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer with stacked experts and a router, as DeepSeek-V3 and JoyAI have"
        )
    return found


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in names)
