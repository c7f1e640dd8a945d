"""Adapt a pretrained transformer with few trained weights, and make it faster while doing so.

The public names are loaded on first use; ``import pyra`` itself needs torch only.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pyra.registering import register_with_transformers

if TYPE_CHECKING:
    from pyra.adapters.published import load_published_checkpoint
    from pyra.backbones import macs, schedule_for, set_rate, unwrap, wrap
    from pyra.backbones.features import token_features
    from pyra.config import PyraConfig
    from pyra.errors import PyraError, UnsupportedModelError
    from pyra.matching import MergePlan, match_tokens
    from pyra.merging import merge_tokens, unmerge_tokens
    from pyra.reactivation import Reactivation

_HOMES = {
    "PyraConfig": "pyra.config",
    "MergePlan": "pyra.matching",
    "match_tokens": "pyra.matching",
    "merge_tokens": "pyra.merging",
    "unmerge_tokens": "pyra.merging",
    "Reactivation": "pyra.reactivation",
    "wrap": "pyra.backbones",
    "unwrap": "pyra.backbones",
    "schedule_for": "pyra.backbones",
    "set_rate": "pyra.backbones",
    "macs": "pyra.backbones",
    "token_features": "pyra.backbones.features",
    "load_published_checkpoint": "pyra.adapters.published",
    "PyraError": "pyra.errors",
    "UnsupportedModelError": "pyra.errors",
}

__all__ = [
    "MergePlan",
    "PyraConfig",
    "PyraError",
    "Reactivation",
    "UnsupportedModelError",
    "load_published_checkpoint",
    "macs",
    "match_tokens",
    "merge_tokens",
    "schedule_for",
    "set_rate",
    "token_features",
    "unmerge_tokens",
    "unwrap",
    "wrap",
]

try:
    __version__ = metadata.version("pyra-adapt")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
