"""Runs on this machine: worker processes that each do one run after another, pinned to a device."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pyra.tasks.shelf import Shelf
from pyra.tasks.sweeps.work import Outcome, Work, perform

_WATCH = 0.5  # seconds between two looks whether the parent lives
_LEAVES_WITHIN = 10  # seconds, then it is killed


class LocalExecutor:
    """A process a slot; one that dies is replaced, and its run ends as killed.

    Args:
        slots: runs at a time.
        devices: of the slots, in turn.
        threads: CPU threads of each.
        logs: folder that gets what each worker prints.
    """

    def __init__(self, slots: int, devices: list[str], threads: int, logs: Path) -> None:
        self.slots, self._logs = slots, logs
        self._devices, self._threads = devices, threads
        self._workers: dict[int, _Worker] = {}

    def submit(self, work: Work) -> None:
        """Hand a run to a free worker."""
        slot = next(n for n in range(self.slots) if n not in self._workers or self._workers[n].work is None)
        worker = self._workers.get(slot)
        if worker is None or not worker.process.is_alive():
            worker = self._workers[slot] = _Worker(self._threads, self._logs / f"worker-{slot}.log")
        device = self._devices[slot % len(self._devices)]
        worker.begin(replace(work, options={**work.options, "device": device}))

    def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
        """Return what has ended since, after at most so long."""
        busy = [worker for worker in self._workers.values() if worker.work is not None]
        if not busy:
            time.sleep(seconds)
            return []
        wait([part for worker in busy for part in (worker.pipe, worker.process.sentinel)], seconds)
        return [ended for worker in busy if (ended := worker.ended()) is not None]

    def stop(self) -> None:
        """End all workers; what they trained so far is in their runs' folders."""
        for worker in self._workers.values():
            worker.pipe.close()  # which ends one that waits for work
            if worker.work is not None:
                worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(_LEAVES_WITHIN)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


class _Worker:
    process: BaseProcess
    pipe: Connection
    work: Work | None = None

    def __init__(self, threads: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        with _environment(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1"):
            self.process = context.Process(target=_serve, args=(theirs, os.getpid(), threads, str(log)), daemon=True)
            self.process.start()
        theirs.close()

    def begin(self, work: Work) -> None:
        self.work = work
        with contextlib.suppress(OSError):  # it has died: `ended` tells
            self.pipe.send(work)

    def ended(self) -> tuple[Work, Outcome] | None:
        assert self.work is not None
        work = self.work
        try:
            if self.pipe.poll():
                outcome = self.pipe.recv()
                self.work = None
                return work, outcome
        except (EOFError, OSError):
            pass
        if self.process.is_alive():
            return None
        self.process.join()
        self.work = None
        return work, killed(self.process.exitcode)


def killed(code: int | None) -> Outcome:
    """Return how a run ended whose process did: SIGKILL is what Linux sends when memory runs out."""
    if code == -signal.SIGKILL:
        return Outcome(kind="memory", error="killed by SIGKILL, as a process is when memory runs out")
    if code is not None and code < 0:
        return Outcome(kind="killed", error=f"its process was ended by {signal.Signals(-code).name}")
    return Outcome(kind="killed", error=f"its process ended with status {code}")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that a child inherits, and libraries read when they load."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, parent: int, threads: int, log: str) -> None:
    """Do runs until the pipe closes."""
    Path(log).parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:  # of libraries, too, and of what ends a process
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; the parent says what is to end
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    from pyra.tasks.quiet import quiet_libraries

    torch.set_num_threads(threads)
    quiet_libraries()
    shelf = Shelf()
    while True:
        try:
            work: Any = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(perform(work, shelf))


def _leave(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)  # and not at once: semaphores are given back


def _end_with(parent: int) -> None:
    """End with the parent, even one that was killed: nobody would know of this process any more."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LEAVES_WITHIN)
    os._exit(1)
