"""What adapters cost: loading, switching, and a training step for every rate, beside PEFT's own and one rate's."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from pyra.adapters import adapt, add_adapter, load_adapter, save_adapter, switch_adapter
from pyra.adapters.elastic import RateSampler, distillation_loss, uncompressed
from pyra.adapters.methods import peft_config
from pyra.config import PyraConfig
from pyra.tasks.benchmarks.model import photographs
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.benchmarks.subject import Subject
from pyra.tasks.timing import Job, Spread, spread_of, spreads

RATES = (0.3, 0.8)
STEP_GOAL = 1.6
_MIDDLE = sum(RATES) / 2


def loading_rows(subject: Subject, rounds: int) -> list[Row]:
    """Load an adapter that merges into a fresh backbone, and as stock PEFT loads the folder: without merging."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(_adapted(subject, 0.5), folder)
        loads = {
            "pyra": lambda base: load_adapter(base, folder),
            "peft": lambda base: PeftModel.from_pretrained(base, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loads}
        for turn in range(rounds + 1):
            for name, load in loads.items():
                base = subject.make()  # made anew, which is not timed
                start = time.perf_counter()
                load(base)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    found = {name: spread_of(values) for name, values in seconds.items()}
    return [_row(subject, "loading an adapter", found["pyra"], {"peft": found["peft"].p50 / found["pyra"].p50})]


def switching_rows(subject: Subject, rounds: int) -> list[Row]:
    """Switch between two adapters of different rates, and as PEFT does between two that do not merge."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        names = {"default": 0.5, "fast": 0.7}
        for name, rate in names.items():
            save_adapter(_adapted(subject, rate), Path(folder) / name)
        ours = add_adapter(load_adapter(subject.make(), Path(folder) / "default"), Path(folder) / "fast", "fast")
        theirs = PeftModel.from_pretrained(subject.make(), Path(folder) / "default")
        theirs.load_adapter(Path(folder) / "fast", "fast")

        def both(switch: Callable[[str], Any]) -> Job:
            return lambda: [switch(name) for name in ("fast", "default")]

        jobs = {"pyra": both(lambda name: switch_adapter(ours, name)), "peft": both(theirs.set_adapter)}
        found = spreads(jobs, rounds * 10)
    return [_row(subject, "switching there and back", found["pyra"], {"peft": found["peft"].p50 / found["pyra"].p50})]


def elastic_rows(subject: Subject, batch_size: int, rounds: int) -> list[Row]:
    """Two training steps over the range, one with its highest rate, and two at the middle of the range."""
    jobs = {
        "fixed": _two_steps(subject, batch_size, elastic=False),
        "elastic": _two_steps(subject, batch_size, elastic=True),
        "distilled": _two_steps(subject, batch_size, elastic=True, distill=True),
    }
    found = spreads(jobs, rounds, device=subject.device)
    rows = []
    for name, goal in (("elastic", STEP_GOAL), ("distilled", None)):
        share = found[name].p50 / found["fixed"].p50
        ratios = {"fixed-rate share": share}
        rows.append(_row(subject, f"two training steps, {name}", found[name], ratios, goal, batch_size))
    return rows


def _row(
    subject: Subject,
    measured: str,
    spread: Spread,
    ratios: dict[str, float],
    goal: float | None = 1.0,
    batch_size: int = 1,
) -> Row:
    ((name, ratio),) = ratios.items()
    reached = None if goal is None else ratio <= goal if name.endswith("share") else ratio >= goal
    return Row(
        measured=measured,
        implementation="pyra",
        backbone=subject.backbone,
        image_size=subject.side(),
        batch_size=batch_size,
        dtype=subject.dtype,
        unit="ms",
        **{name: 1e3 * value for name, value in spread._asdict().items()},
        ratios=ratios,
        goal=goal,
        reached=reached,
    )


def _adapted(subject: Subject, rate: float, rate_range: list[float] | None = None) -> nn.Module:
    config = PyraConfig(rate=rate, rate_range=rate_range, backend=subject.backend, attention=subject.attention)
    return adapt(subject.make(), pyra=config, peft=peft_config("lora", 8))


def _two_steps(subject: Subject, batch_size: int, elastic: bool, distill: bool = False) -> Job:
    model = _adapted(subject, RATES[-1] if elastic else _MIDDLE, list(RATES) if elastic else None).train()
    images = photographs(subject, batch_size)
    labels = torch.arange(batch_size, device=images.device) % 100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sampler = RateSampler(list(RATES), steps_between=1)  # between: the middle

    def backward(taken: slice, weight: float) -> None:
        teacher = None
        if distill:
            with uncompressed(model):
                teacher = model(images[taken])
        logits = model(images[taken])
        loss = F.cross_entropy(logits, labels[taken])
        (weight * (loss if teacher is None else loss + distillation_loss(logits, teacher))).backward()

    def run() -> None:
        for step in range(2):
            for part in sampler.parts(step) if elastic else ():
                sampler.apply(model, part.rate)
                backward(part.rows(batch_size), part.weight)
            if not elastic:
                backward(slice(batch_size), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run
