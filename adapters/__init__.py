"""PEFT with merging: one call that wraps and adapts a backbone, and saves, loads, folds and publishes the outcome.

The public names are loaded on first use: what lists methods and tasks needs no peft.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyra.adapters.adapting import adapt as adapt
    from pyra.adapters.bottleneck import BottleneckConfig as BottleneckConfig
    from pyra.adapters.card import CardInfo as CardInfo
    from pyra.adapters.expert_lora import ExpertLoraConfig as ExpertLoraConfig
    from pyra.adapters.fold import fold_adapter as fold_adapter
    from pyra.adapters.hub import push_adapter as push_adapter
    from pyra.adapters.loading import load_adapter as load_adapter
    from pyra.adapters.prompts import VisualPromptsConfig as VisualPromptsConfig
    from pyra.adapters.quantised import quantize_backbone as quantize_backbone
    from pyra.adapters.recipe import Recipe as Recipe
    from pyra.adapters.recipe import paper_recipe as paper_recipe
    from pyra.adapters.saving import save_adapter as save_adapter
    from pyra.adapters.several import add_adapter as add_adapter
    from pyra.adapters.several import switch_adapter as switch_adapter

# Where bitsandbytes is installed, peft imports it, and on a CPU it advises to install one more package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "adapt": "pyra.adapters.adapting",
    "BottleneckConfig": "pyra.adapters.bottleneck",
    "CardInfo": "pyra.adapters.card",
    "ExpertLoraConfig": "pyra.adapters.expert_lora",
    "fold_adapter": "pyra.adapters.fold",
    "push_adapter": "pyra.adapters.hub",
    "load_adapter": "pyra.adapters.loading",
    "VisualPromptsConfig": "pyra.adapters.prompts",
    "quantize_backbone": "pyra.adapters.quantised",
    "Recipe": "pyra.adapters.recipe",
    "paper_recipe": "pyra.adapters.recipe",
    "save_adapter": "pyra.adapters.saving",
    "add_adapter": "pyra.adapters.several",
    "switch_adapter": "pyra.adapters.several",
}

__all__ = [
    "BottleneckConfig",
    "CardInfo",
    "ExpertLoraConfig",
    "Recipe",
    "VisualPromptsConfig",
    "adapt",
    "add_adapter",
    "fold_adapter",
    "load_adapter",
    "paper_recipe",
    "push_adapter",
    "quantize_backbone",
    "save_adapter",
    "switch_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyra.adapters' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
