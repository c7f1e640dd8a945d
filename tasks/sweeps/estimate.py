"""What the runs of a sweep will take, from a few measured steps."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pyra.tasks.options import RunOptions
from pyra.tasks.sweeps.grid import Planned

_STEPS = 2  # timed, after one that is not
_TEST_FORWARDS = 7 * 2 + 1  # a run times itself against the unmerged backbone, in turns


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        seconds: training, scoring and timing.
        memory_bytes: at the peak: of the process, or on a GPU.
    """

    seconds: float
    memory_bytes: int | None


def kind_of(planned: Planned) -> str:
    """Return the address of a run with the seed left out: what takes the same."""
    return dataclasses.replace(planned, options=dataclasses.replace(planned.options, seed=0)).address


def probe_apart(planned: Planned) -> Estimate:
    """Probe a run in a process of its own, which has its own memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(probe, planned.options).result()
        except BrokenProcessPool:
            raise MemoryError(f"the process that tried {planned.name} was killed") from None


def probe(options: RunOptions) -> Estimate:
    """Measure a few training steps and a forward of a run's model on drawn images, and count the rest."""
    import torch
    from torch.nn import functional as F

    from pyra.backbones.loading import preprocessing
    from pyra.tasks.runs import DTYPES, new_model, resolve_device, task_for
    from pyra.tasks.usage import Meter

    device = resolve_device(options.device)
    task = task_for(options)
    meter = Meter(device).start()
    started = time.perf_counter()
    model = new_model(options, len(task.labels)).to(device).train()
    seconds = time.perf_counter() - started
    side = preprocessing(model).image_size
    images = torch.randn(options.batch_size, 3, side, side, device=device)
    labels = torch.arange(options.batch_size, device=device) % len(task.labels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr)
    dtype = DTYPES[options.dtype]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(images)

    a_step = _seconds(step, device)
    model.eval()
    a_forward = _seconds(forward, device)
    counts = [len(task.splits[name]) for name in ("train", "test")]
    trains, tests = (count if options.limit is None else min(count, options.limit) for count in counts)
    passes = options.epochs if options.method != "linear" else 0  # a probe trains on stored features
    seconds += passes * trains / options.batch_size * a_step
    seconds += (tests + (trains if options.method == "linear" else 0)) / options.batch_size * a_forward
    return Estimate(seconds + _TEST_FORWARDS * a_forward, meter.stop().peak_memory_bytes)


def _seconds(job: object, device: object) -> float:
    import torch

    assert callable(job)
    job()
    started = time.perf_counter()
    for _ in range(_STEPS):
        job()
    if getattr(device, "type", "") == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / _STEPS
