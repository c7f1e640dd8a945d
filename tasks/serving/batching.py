"""Batches across requests: one thread runs the model on the images that have come together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor


class QueueFull(Exception):
    """As many images wait already as may."""


class Closed(Exception):
    """No image is taken any more, or was not answered before the end."""


class Expired(Exception):
    """Nobody waits for the answer any more; the model never saw the image."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one image.

    Attributes:
        probabilities: [classes].
        queue_ms: that the image waited.
        model_ms: that the model took for its batch.
        batch_size: images in the batch.
    """

    probabilities: Tensor
    queue_ms: float
    model_ms: float
    batch_size: int


@dataclass
class _Job:
    pixels: Tensor
    deadline: float
    future: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """A queue of images and the one thread that empties it.

    The first image of a batch waits at most ``max_wait_ms`` for others; while the model is at work they gather anyway.

    Args:
        run: prepared images, uint8 [B, 3, S, S], to probabilities [B, classes]. Called from one thread only.
        max_batch: images in a batch.
        max_wait_ms: that the first image of a batch waits for others.
        max_queue: images that wait; the batch in the model is not counted.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *, max_batch: int, max_wait_ms: float, max_queue: int) -> None:
        self._run, self._max_batch, self._wait, self._max_queue = run, max_batch, max_wait_ms / 1000, max_queue
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a model that never returns does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="pyra-batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def submit(self, pixels: Tensor, deadline: float) -> Future[Answer]:
        """Queue one prepared image, uint8 [3, S, S].

        Args:
            pixels: of the image.
            deadline: on the clock of ``time.perf_counter``; an image the model has not seen by then is dropped.

        Returns:
            The answer to come, or :class:`Expired`, :class:`Closed`, or what the model raised.

        Raises:
            QueueFull, Closed: where the image is not taken.
        """
        job = _Job(pixels, deadline)
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._jobs) >= self._max_queue:
                raise QueueFull
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self, timeout: float) -> None:
        """Take no more images, answer those that wait, and end the thread; what is left after ``timeout`` s fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._changed:
            left = list(self._jobs)
            self._jobs.clear()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Closed())

    def _work(self) -> None:
        while (jobs := self._collect()) is not None:
            now = time.perf_counter()
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            for job in [job for job in wanted if job.deadline <= now]:
                job.future.set_exception(Expired())
            self._answer([job for job in wanted if job.deadline > now])

    def _collect(self) -> list[_Job] | None:
        """Wait for a batch; None when the queue is closed and empty."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            until = time.perf_counter() + self._wait
            while len(self._jobs) < self._max_batch and not self._closed:
                left = until - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(left)
            return [self._jobs.popleft() for _ in range(min(len(self._jobs), self._max_batch))]

    def _answer(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        start = time.perf_counter()
        try:
            rows = self._run(torch.stack([job.pixels for job in jobs])).unbind()
            took = 1000 * (time.perf_counter() - start)
            answers = [
                Answer(row, 1000 * (start - job.since), took, len(jobs)) for job, row in zip(jobs, rows, strict=True)
            ]
        except Exception as error:  # whatever a model or a runtime raises: the next batch may be fine
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)
