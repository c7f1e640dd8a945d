"""What the images cost a training step: from the data set, against the same step on batches that lie in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.benchmarks.subject import Subject
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.pixel_cache import PixelCache
from pyra.tasks.data.task import load_task
from pyra.tasks.fitting.augmentation import AugmentedImages
from pyra.tasks.timing import Job, Spread, spreads

GOAL = 1.05
POLICY = "rand-m9-mstd0.5-inc1"
"""timm's usual RandAugment, which changes every image anew."""
_KEPT = 8  # batches in memory


def input_rows(subject: Subject, batch_size: int, rounds: int, name: str | None = None) -> list[Row]:
    """Time steps with batches from the pipeline and from memory, in turns: of LoRA, and of PYRA at the high schedule.

    Images are those of the demo task, mapped from a cache that was just written: the disk itself is not measured. The
    pipeline runs in the process that trains, as it does in training, once as it is and once with RandAugment.

    Args:
        subject: the model; its weights are random.
        batch_size: images a step.
        rounds: timed steps of each.
        name: what rows call the model.
    """
    photographs = load_task("demo").splits["train"]
    with tempfile.TemporaryDirectory() as folder:
        data = ImageDataset(
            photographs.select(range(min(len(photographs), 2 * _KEPT * batch_size))),
            image_size=subject.side(),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            name="demo/train",
            cache=PixelCache(Path(folder)),
        )
        rows = []
        for method, config in (("lora", None), ("pyra, high", subject.merging("high"))):
            model = adapt(subject.make(), pyra=config, peft=peft_config("lora", 8)).train()
            step = _Step(model, subject)
            streams = {
                "pipeline": _endless(data, batch_size),
                "pipeline, RandAugment": _endless(AugmentedImages(data, POLICY, seed=0), batch_size),
            }
            kept = itertools.cycle([next(streams["pipeline"]) for _ in range(_KEPT)])
            jobs: dict[str, Job] = {"memory": partial(_taken, kept, step)}
            for ran, stream in streams.items():
                jobs |= {ran: partial(_taken, stream, step), f"batch of {ran}": partial(next, stream)}
            took = spreads(jobs, rounds, 2, subject.device)
            rows += [_row(subject, name, f"training step, {method}", batch_size, ran, took) for ran in streams]
    return rows


class _Step:
    """A training step on a batch, its way to the device included."""

    def __init__(self, model: torch.nn.Module, subject: Subject) -> None:
        self.model, self.device, self.dtype = model, subject.device, getattr(torch, subject.dtype)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def __call__(self, batch: dict[str, Any]) -> None:
        logits = self.model(batch["pixel_values"].to(self.device, self.dtype))
        F.cross_entropy(logits, batch["labels"].to(self.device)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _endless(data: Dataset[Any], batch_size: int) -> Iterator[Any]:
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def _taken(batches: Iterator[Any], step: _Step) -> None:
    step(next(batches))


def _row(
    subject: Subject, name: str | None, measured: str, batch_size: int, ran: str, took: Mapping[str, Spread]
) -> Row:
    share = took[ran].p50 / took["memory"].p50
    batch = took[f"batch of {ran}"].p50
    return Row(
        measured=measured,
        implementation=ran,
        backbone=name or subject.backbone,
        image_size=subject.side(),
        batch_size=batch_size,
        dtype=subject.dtype,
        unit="ms",
        **{quantile: 1e3 * value for quantile, value in took[ran]._asdict().items()},
        ratios={"in-memory share": share},
        goal=GOAL,
        reached=share <= GOAL,
        detail=f"{1e3 * took['memory'].p50:.4g} ms from memory, {1e3 * batch:.3g} ms to make a batch",
    )
