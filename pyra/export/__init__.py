"""Deployment: an adapted model as files that run without PEFT, and most of them without this library.

Every export is reloaded and compared with the model before it counts as done.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyra.export.engine_check import check_engine_folder
    from pyra.export.exporting import export_model
    from pyra.export.formats import FORMATS
    from pyra.export.hf import load_model
    from pyra.export.int4 import write_int4
    from pyra.export.language import LanguageModel, export_language_model
    from pyra.export.language_formats import LANGUAGE_FORMATS
    from pyra.export.loading import Exported, load_exported
    from pyra.export.report import Comparison, ExportReport

_HOMES = {
    "FORMATS": "formats",
    "LANGUAGE_FORMATS": "language_formats",
    "Comparison": "report",
    "ExportReport": "report",
    "Exported": "loading",
    "LanguageModel": "language",
    "check_engine_folder": "engine_check",
    "export_language_model": "language",
    "export_model": "exporting",
    "load_exported": "loading",
    "load_model": "hf",
    "write_int4": "int4",
}

__all__ = [
    "FORMATS",
    "LANGUAGE_FORMATS",
    "Comparison",
    "ExportReport",
    "Exported",
    "LanguageModel",
    "check_engine_folder",
    "export_language_model",
    "export_model",
    "load_exported",
    "load_model",
    "write_int4",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyra.export' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pyra.export.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
