"""What runs of one process share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Shelf:
    """Keeps what is expensive to make and the same for many runs: tasks and decoded images.

    Backbones are made anew for each run. Their weights are a file that is mapped into memory, and so read once a
    machine; what takes the time is to draw the values that a run's seed starts from, which a copy would not have.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what was made for a key before, or make it."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
