"""Sweeps elsewhere: a Ray cluster of two nodes, one of which dies, and jobs as Slurm's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pyra.tasks.results import RESULT_FILE, read_result
from pyra.tasks.sweeps import drive
from pyra.tasks.sweeps.cluster import SlurmExecutor, _fits
from pyra.tasks.sweeps.drive import Progress, sweep
from pyra.tasks.sweeps.folder import RUNS
from pyra.tasks.sweeps.grid import SweepOptions

TINY: dict[str, Any] = {"limit": 8, "epochs": 1.0, "batch_size": 4, "image_size": 32, "device": "cpu"}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster whose head takes no runs, and two nodes with a CPU each."""
    pytest.importorskip("ray", reason="the extra `sweeps` is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    workers = [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
    yield cluster, workers
    cluster.shutdown()


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "runs"),
    [
        ({"CPU": 8.0}, 2.0, 0.0, 4),
        ({"CPU": 1.0}, 2.0, 0.0, 0),  # two such nodes have two CPUs together, and no run fits on either
        ({"CPU": 8.0, "GPU": 2.0}, 1.0, 1.0, 2),
        ({"CPU": 8.0, "GPU": 1.0}, 1.0, 0.25, 4),
        ({"CPU": 8.0}, 1.0, 1.0, 0),
        ({"GPU": 3.0}, 0.0, 1.0, 3),
        ({}, 1.0, 0.0, 0),
    ],
)
def test_a_run_takes_place_on_one_node(resources: dict[str, float], cpus: float, gpus: float, runs: int) -> None:
    assert _fits(resources, cpus, gpus) == runs


@pytest.mark.slow  # two nodes of Ray start, and workers load torch: a minute
def test_a_node_that_dies_in_mid_sweep_loses_and_doubles_nothing(tmp_path: Path, nodes: Any) -> None:
    cluster, workers = nodes
    lost: list[Any] = []
    counted: list[int] = []

    def tell(progress: Progress) -> None:
        counted.append(len(progress.running))
        if progress.finished and len(progress.running) == 2 and not lost:
            lost.append(workers.pop())
            cluster.remove_node(lost[0], allow_graceful=False)

    given = SweepOptions(method="lora,pyra", rate="0.3,0.5,0.7", output=str(tmp_path / "sweep"), executor="ray",
                         address=cluster.address, seeds=2, **TINY)  # fmt: skip
    progress = sweep(given, tell)
    assert lost and max(counted) == 2
    assert not progress.failed and len(progress.finished) == progress.total == 8
    folders = sorted((tmp_path / "sweep" / RUNS).iterdir())
    assert len(folders) == 8 and all((folder / RESULT_FILE).is_file() for folder in folders)
    assert not list((tmp_path / "sweep").glob("runs/*/.partial-*/result.json"))
    seen = {(row.method, row.rate, row.seed) for row in map(read_result, folders)}
    assert len(seen) == 8


@pytest.mark.slow  # a process each job, which loads torch
def test_jobs_of_slurm_are_done_by_processes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="the extra `sweeps` is not installed")

    def local(options: SweepOptions, folder: Path) -> SlurmExecutor:
        return SlurmExecutor(1, folder / "jobs", options.cpus, options.gpus, cluster="local")

    monkeypatch.setattr(drive, "executor_for", local)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    given = SweepOptions(method="lora,pyra", rate="0.5", output=str(tmp_path / "sweep"), executor="slurm", **TINY)
    progress = sweep(given)
    assert not progress.failed and len(progress.finished) == 2
