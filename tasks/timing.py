"""Measured speed. Machines are shared and drift, so models are compared in turns within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def throughput(
    models: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 5, warmup: int = 1
) -> dict[str, float]:
    """Measure images/s of several models on the same batch, in turns.

    Args:
        models: by name, all on the device of ``images``.
        images: [B, 3, H, W].
        rounds: timed forwards of each model; the median counts.
        warmup: forwards before that.

    Returns:
        Images a second, by name.
    """
    seconds = take_turns({name: _forward(model.eval(), images) for name, model in models.items()}, rounds, warmup)
    return {name: len(images) / value for name, value in seconds.items()}


def take_turns(jobs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Run the jobs A B C A B C ... and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return run
