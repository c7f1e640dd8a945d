"""Models of ours in transformers' Auto classes, without importing transformers before somebody needs it.

``import pyra`` puts a finder in front of the others that waits for transformers' Auto classes. Ours register with them
at the end of the import that brought them, when no module of transformers is half-way through: ours need many of them,
and whichever somebody imports first is the last one to be finished.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_THEIRS = "transformers"
_AUTO = "transformers.models.auto.configuration_auto"
_OURS = ("pyra.export.auto", "pyra.backbones.joyai", "pyra.backbones.hf_decoder_folder")


def register_with_transformers() -> None:
    """Register now where transformers' Auto classes are imported already, otherwise when they are."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    for name in _OURS:
        importlib.import_module(name)


class _Waiting(MetaPathFinder):
    """Finds modules of transformers by the other finders, and counts which of them are being imported."""

    def __init__(self) -> None:
        self._asking, self._open = False, 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a module's own spec with a loader that is counted; None for what is not of transformers."""
        if self._asking or fullname.partition(".")[0] != _THEIRS:
            return None
        self._asking = True  # the others are to find it
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec

    def began(self) -> None:
        """Count a module whose import begins."""
        self._open += 1

    def ended(self) -> None:
        """Register with the Auto classes, once, where they are there and nothing is half-way any more."""
        self._open -= 1
        if not self._open and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


class _Counted(Loader):
    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self._loader, self._waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._waiting.began()
        try:
            self._loader.exec_module(module)
        finally:
            self._waiting.ended()
