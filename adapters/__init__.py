"""PEFT with merging: one call that wraps and adapts a backbone, and saves, loads and folds the outcome."""

from pyra.adapters.adapt import adapt
from pyra.adapters.bottleneck import BottleneckConfig
from pyra.adapters.fold import fold_adapter
from pyra.adapters.saving import load_adapter, save_adapter

__all__ = ["BottleneckConfig", "adapt", "fold_adapter", "load_adapter", "save_adapter"]
