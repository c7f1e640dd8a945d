"""Training after the first one on trl: on chats, on preferences and on rewards that can be verified.

The public names are loaded on first use: the gate of FiberPO needs no trl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyra.tasks.posttraining.fiberpo import FiberLevel as FiberLevel
    from pyra.tasks.posttraining.fiberpo import fiberpo_log_gate as fiberpo_log_gate
    from pyra.tasks.posttraining.fiberpo import fiberpo_regimes as fiberpo_regimes
    from pyra.tasks.posttraining.fiberpo_trainer import FiberPOConfig as FiberPOConfig
    from pyra.tasks.posttraining.fiberpo_trainer import FiberPOTrainer as FiberPOTrainer

_HOMES = {
    "FiberLevel": "pyra.tasks.posttraining.fiberpo",
    "FiberPOConfig": "pyra.tasks.posttraining.fiberpo_trainer",
    "FiberPOTrainer": "pyra.tasks.posttraining.fiberpo_trainer",
    "fiberpo_log_gate": "pyra.tasks.posttraining.fiberpo",
    "fiberpo_regimes": "pyra.tasks.posttraining.fiberpo",
}

__all__ = ["FiberLevel", "FiberPOConfig", "FiberPOTrainer", "fiberpo_log_gate", "fiberpo_regimes"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyra.tasks.posttraining' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
