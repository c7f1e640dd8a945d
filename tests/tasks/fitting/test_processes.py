"""What a run that several processes share leaves behind in each of them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from module_and_its_threads import gloo_threads

from pyra.tasks.fitting import processes


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lists a process's threads")
def test_leaving_ends_the_threads_of_a_group_that_is_part_of_a_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer's group is; a thread that lives on aborts the process now and then, as Python shuts down."""
    before = gloo_threads()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(3))
    kept: list[object] = [dist.group.WORLD]
    kept.append(kept)
    del kept
    assert len(gloo_threads()) > len(before)
    monkeypatch.setenv("WORLD_SIZE", "2")
    gc.disable()  # only what `leave` collects counts
    try:
        processes.leave()
    finally:
        gc.enable()
    assert not dist.is_initialized()
    assert gloo_threads() == before
