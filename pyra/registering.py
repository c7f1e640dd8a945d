"""Exported models in transformers' Auto classes, without importing transformers before somebody needs it.

``import pyra`` puts a finder in front of the others that waits for transformers' modules of Auto classes, and has ours,
which register with them, imported once they are there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# In this order: the second imports the first.
_OURS = {
    "transformers.models.auto.configuration_auto": "pyra.export.merged_config",
    "transformers.models.auto.modeling_auto": "pyra.export.auto",
}


def register_with_transformers() -> None:
    """Register now with those of transformers' Auto classes that are imported already, with others when they are."""
    for theirs, ours in _OURS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds the modules it waits for by the other finders, and has ours imported when they have run."""

    def __init__(self) -> None:
        self._awaited = {theirs for theirs in _OURS if theirs not in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with a loader that registers afterwards; None for every other module."""
        if fullname not in self._awaited:
            return None
        self._awaited.remove(fullname)  # the others are to find it
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _OURS[fullname])
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        importlib.import_module(self._ours)
