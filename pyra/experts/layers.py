"""The layers of a model that have routed experts, as transformers builds DeepSeek-V3's and its relatives'."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyra.errors import UnsupportedModelError

_STACKED = ("gate_up_proj", "down_proj", "num_experts")
_ROUTER = ("weight", "top_k", "num_experts")


def expert_layers(model: nn.Module, through_adapters: bool = False) -> dict[str, Any]:
    """Return the mixtures of a model by name: modules with stacked ``experts`` and a router ``gate``.

    Args:
        model: to look into.
        through_adapters: find mixtures whose experts or router carry an adapter, too.

    Raises:
        UnsupportedModelError: for a model that has none, or (without ``through_adapters``) one whose experts or
            routers carry an adapter.
    """
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_mixture(module)}
    adapted = [n for n, m in found.items() if hasattr(m.experts, "base_layer") or hasattr(m.gate, "base_layer")]
    if adapted and not through_adapters:
        raise UnsupportedModelError(f"{adapted[0]} has experts or a router with an adapter: fold_adapter it first")
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer with stacked experts and a router, as DeepSeek-V3 and JoyAI have"
        )
    return found


def has_experts(model: nn.Module) -> bool:
    """Whether a model has mixtures as :func:`expert_layers` finds them."""
    return any(_is_mixture(module) for module in model.modules())


def layer_number(name: str) -> int | None:
    """Return the number of the decoder layer that a mixture is in, from its name.

    >>> layer_number("model.layers.12.mlp")
    12
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else None


def _is_mixture(module: nn.Module) -> bool:
    return _has(_plain(module, "experts"), _STACKED) and _has(_plain(module, "gate"), _ROUTER)


def _plain(module: Any, name: str) -> Any:
    """Return a child without the PEFT layers around it."""
    found: Any = getattr(module, name, None)
    while hasattr(found, "base_layer"):
        found = found.base_layer
    return found


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in names)
