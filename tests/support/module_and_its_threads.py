"""Run a module, as ``python -m`` does, and say at the very end which threads of gloo are still there.

They are named in ``THREADS []``, a line of each process; Linux alone lists a process's threads.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn


def gloo_threads() -> list[str]:
    """Return the names of this process's threads that exchange tensors with other processes."""
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def leave_at_once(status: int) -> NoReturn:
    """End this process without Python's shutting down: DTensor's caches keep a group, and its threads, until then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.platform == "linux":
        atexit.register(lambda: os.write(1, f"THREADS {gloo_threads()}\n".encode()))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
