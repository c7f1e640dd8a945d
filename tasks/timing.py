"""Measured speed. Machines are shared and drift, so jobs are compared in turns within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

Job = Callable[[], object]
_FLUSHED = 256 * 2**20  # bytes written before each turn on a GPU: more than its cache holds


class Spread(NamedTuple):
    """Seconds that a job took: quantiles of its turns."""

    p20: float
    p50: float
    p80: float


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
    jobs = {name: forward(model.eval(), images) for name, model in models.items()}
    return {name: len(images) / value for name, value in take_turns(jobs, rounds, warmup, images.device).items()}


def take_turns(
    jobs: Mapping[str, Job], rounds: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Run the jobs A B C A B C ... and return the median seconds of each."""
    return {name: spread.p50 for name, spread in spreads(jobs, rounds, warmup, device).items()}


def spreads(
    jobs: Mapping[str, Job], rounds: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Spread]:
    """Run the jobs A B C A B C ... and return what each took.

    On a GPU its own clock counts (events in the stream), and each turn starts with a cold cache.

    Args:
        jobs: by name.
        rounds: timed turns of each.
        warmup: turns before that.
        device: where the jobs run.
    """
    run = _on_a_gpu(torch.device(device)) if torch.device(device).type == "cuda" else _seconds
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            took = run(job)
            if turn >= warmup:
                times[name].append(took)
    return {name: spread_of(values) for name, values in times.items()}


def forward(model: nn.Module, images: Tensor) -> Job:
    """Return a job that runs ``model`` on ``images`` without gradients."""

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def graphed(job: Job) -> Job:
    """Return a job that replays a CUDA graph of ``job``: what the GPU takes, without what the host takes to ask it.

    Args:
        job: work on the current GPU, the same each time, on tensors that stay where they are.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def _seconds(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _on_a_gpu(device: torch.device) -> Callable[[Job], float]:
    buffer = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def run(job: Job) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        start.record()
        job()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3  # milliseconds

    return run


def spread_of(values: list[float]) -> Spread:
    """Return the quantiles of the seconds of several turns."""
    if len(values) == 1:
        return Spread(*values * 3)
    p20, p80 = (statistics.quantiles(values, n=5, method="inclusive")[at] for at in (0, 3))
    return Spread(p20, statistics.median(values), p80)
