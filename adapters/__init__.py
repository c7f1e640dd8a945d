"""PEFT with merging: one call that wraps and adapts a backbone, and saves, loads, folds and publishes the outcome."""

from pyra.adapters.adapt import adapt
from pyra.adapters.bottleneck import BottleneckConfig
from pyra.adapters.card import CardInfo
from pyra.adapters.fold import fold_adapter
from pyra.adapters.hub import push_adapter
from pyra.adapters.loading import load_adapter
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.quantised import quantize_backbone
from pyra.adapters.recipe import Recipe, paper_recipe
from pyra.adapters.saving import save_adapter
from pyra.adapters.several import add_adapter, switch_adapter

__all__ = [
    "BottleneckConfig",
    "CardInfo",
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
