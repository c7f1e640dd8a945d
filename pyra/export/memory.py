"""Memory between the steps of an export, each of which may need as much as the model has."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_memory_back() -> None:
    """Return freed memory to the system.

    Graphs are circles of nodes, which only the collector frees; and glibc keeps what it gave out in pieces of up to
    32 MB, which most weights are, until it is asked for it.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
