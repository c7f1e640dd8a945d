"""The base class of this package's metrics."""

from __future__ import annotations

from typing import Any

import evaluate


class InMemoryMetric(evaluate.Metric):
    """Modifications against `evaluate.Metric`: predictions stay in memory by default, and then no folder is made."""

    def __init__(self, *args: Any, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root) if self.keep_in_memory else str(super()._build_data_dir())
