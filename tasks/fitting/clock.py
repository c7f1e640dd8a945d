"""How long a training took, in all the sittings it took."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor


class Clock:
    """Counts wall-clock seconds from its making on, and those that a checkpoint knows of."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._earlier = 0.0

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._earlier + time.perf_counter() - self._start

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: the seconds until now."""
        return {"seconds": torch.tensor(self.seconds(), dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Count what was trained before the interruption, up to the checkpoint."""
        if "seconds" in tensors:
            self._earlier = float(tensors["seconds"])
