"""Scoring: what is deployed (adapter folded, tokens merged) is what is scored and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pyra.backbones import macs, unwrap, wrapped_schedule
from pyra.tasks.metrics import load_metric
from pyra.tasks.timing import throughput


@dataclass(frozen=True)
class Measured:
    """Speed and cost of a model beside the same backbone without merging (one run, same batch)."""

    images_per_second: float
    speedup: float
    macs: int
    plain_macs: int
    schedule: list[int]

    @property
    def rate(self) -> float:
        """Share of the MACs saved."""
        return 1 - self.macs / self.plain_macs


def score(
    model: Callable[[Tensor], Tensor],
    data: Dataset[dict[str, Any]],
    *,
    metric: str = "accuracy",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    description: str = "evaluating",
) -> float:
    """Score a classifier on a data set; what :func:`pyra.tasks.metrics.load_metric` computes, as a fraction.

    Args:
        model: pixel values [B, 3, S, S] to logits [B, classes]; a module should be in evaluation mode.
        data: items with ``pixel_values`` and ``labels``.
        metric: name of the metric.
        batch_size: images a forward.
        device: where the images go.
        dtype: autocast precision; float32 means none.
        description: label of the progress bar.
    """
    computed = load_metric(metric)
    device = torch.device(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in tqdm(DataLoader(data, batch_size=batch_size), desc=description, unit="batch", leave=False):
            logits = model(batch["pixel_values"].to(device))
            computed.add_batch(predictions=logits.argmax(-1).cpu(), references=batch["labels"])
    return float(computed.compute()[metric])


def measure(model: nn.Module, images: Tensor, rounds: int = 7) -> Measured:
    """Time a folded model against its own unwrapped copy, in turns.

    Args:
        model: a backbone without PEFT layers, wrapped or not.
        images: [B, 3, S, S] on the model's device.
        rounds: timed forwards of each.
    """
    plain = unwrap(copy.deepcopy(model))
    speeds = throughput({"plain": plain, "model": model}, images, rounds=rounds)
    plain_macs = macs(plain)
    schedule = wrapped_schedule(model) or [0] * len(model.blocks)  # type: ignore[arg-type]
    return Measured(
        images_per_second=speeds["model"],
        speedup=speeds["model"] / speeds["plain"] if any(schedule) else 1.0,
        macs=macs(model),
        plain_macs=plain_macs,
        schedule=schedule,
    )
