"""Runs elsewhere: on a Ray cluster, or as jobs of Slurm through submitit. The sweep's folder must be the same there."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.tasks.shelf import Shelf
from pyra.tasks.sweeps.work import Outcome, Work, perform

_REACHED_WITHIN = 10.0  # seconds
_TRIES = 3  # of a run whose node dies
_shelf = Shelf()  # of a worker process of Ray, which does one run after another


class RayExecutor:
    """A task of Ray each run; one whose node dies is begun again on another, and goes on from its checkpoint.

    Args:
        slots: runs that are submitted at a time; None leaves it to the cluster's size.
        address: of a cluster; None starts one on this machine.
        cpus: of a run.
        gpus: of a run.

    Raises:
        ConfigError: where Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, slots: int | None, address: str | None, cpus: float, gpus: float) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("--executor ray needs ray: pip install 'pyra-adapt[sweeps]'") from None
        self._ray = ray
        _refuse_unreachable(address)
        try:
            ray.init(address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--address {address or 'of a new cluster'}: Ray cannot be reached: {reason}") from None
        fits = sum(_fits(node["Resources"], cpus, gpus) for node in ray.nodes() if node["Alive"])
        if fits < 1:
            ray.shutdown()
            raise ConfigError(f"no node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for a run")
        self.slots = slots or fits
        remote = ray.remote(_perform_on_a_node)
        self._begin = remote.options(num_cpus=cpus, num_gpus=gpus, max_retries=_TRIES)
        self._running: dict[Any, Work] = {}

    def submit(self, work: Work) -> None:
        """Submit a run."""
        self._running[self._begin.remote(work)] = work

    def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
        """Return what has ended since, after at most so long."""
        if not self._running:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [(self._running.pop(reference), self._outcome(reference)) for reference in done]

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.OutOfMemoryError as error:
            return Outcome(kind="memory", error=f"Ray ended it for memory: {_first_line(error)}")
        except errors.RayError as error:
            return Outcome(kind="killed", error=f"{type(error).__name__}: {_first_line(error)}")
        return outcome

    def stop(self) -> None:
        """End what runs, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _fits(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many runs a node can do at a time."""
    most = int(resources.get("CPU", 0) // cpus) if cpus else 10_000
    return min(most, int(resources.get("GPU", 0) // gpus)) if gpus else most


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # none, or "auto"
    try:
        socket.create_connection((host, int(port)), _REACHED_WITHIN).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--address {address}: no Ray cluster can be reached there: {reason}") from None


def _perform_on_a_node(work: Work) -> Outcome:
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    return perform(work, _shelf)


class SlurmExecutor:
    """A job of Slurm each run, through submitit.

    Args:
        slots: jobs at a time.
        folder: of the jobs' files.
        cpus: of a run.
        gpus: of a run.
        cluster: ``"slurm"``; ``"local"`` runs the jobs as processes here, for tests.

    Raises:
        ConfigError: where submitit is not installed or there is no Slurm.
    """

    def __init__(self, slots: int, folder: Path, cpus: float, gpus: float, cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError("--executor slurm needs submitit: pip install 'pyra-adapt[sweeps]'") from None
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError("--executor slurm: there is no sbatch here; start the sweep on a login node")
        if cpus != int(cpus) or gpus != int(gpus):
            raise ConfigError("--executor slurm gives whole CPUs and GPUs")
        self.slots = slots
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._executor.update_parameters(
            name="pyra", cpus_per_task=max(int(cpus), 1), gpus_per_node=int(gpus), timeout_min=24 * 60
        )
        self._running: dict[Any, Work] = {}

    def submit(self, work: Work) -> None:
        """Submit a run."""
        self._running[self._executor.submit(_perform_on_a_node, work)] = work

    def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
        """Return what has ended since, after at most so long."""
        until = time.monotonic() + seconds
        while True:
            done = [job for job in self._running if job.done()]
            if done or time.monotonic() >= until:
                return [(self._running.pop(job), _of_job(job)) for job in done]
            time.sleep(min(0.5, seconds))

    def stop(self) -> None:
        """Cancel what runs."""
        for job in self._running:
            job.cancel()
        self._running.clear()


def _of_job(job: Any) -> Outcome:
    try:
        outcome: Outcome = job.result()
    except Exception as error:  # whatever submitit makes of a job that ended badly
        text = _first_line(error)
        kind = "memory" if "OUT_OF_ME" in text or "oom" in text.lower() else "killed"
        return Outcome(kind=kind, error=f"{type(error).__name__}: {text}")
    return outcome


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
