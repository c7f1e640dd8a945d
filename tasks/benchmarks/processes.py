"""Memory as a process of its own needs it: nothing that ran before is counted."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_fresh_process(job: Callable[..., Result], *arguments: object) -> Result:
    """Run a job in a process of its own, with as many threads as this one has."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), job, *arguments).result()


def _with_threads(threads: int, job: Callable[..., Result], *arguments: object) -> Result:
    torch.set_num_threads(threads)
    return job(*arguments)


def resident(field: str) -> int:
    """Resident bytes of this process, now (``VmRSS:``) or at most (``VmHWM:``), as Linux tells them.

    Elsewhere the peak stands for both; on Linux ``ru_maxrss`` would include the parent's before ``exec``.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_above_loaded(run: Callable[[], object], device: str) -> int:
    """Return the peak bytes of a run above what is held before it: of the process, or allocated on the GPU."""
    if torch.device(device).type == "cuda":
        loaded = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - loaded
    with contextlib.suppress(OSError):  # where a system does not let it, the peak of the loading may stand for it
        Path("/proc/self/clear_refs").write_text("5")
    loaded = resident("VmRSS:")
    run()
    return resident("VmHWM:") - loaded
