"""What a classifier answers on every example of a split, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pyra.errors import TrainingError
from pyra.tasks.fitting import processes
from pyra.tasks.metrics import load_metric


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

    Arguments and errors are those of :func:`predict`, and the name of a metric.
    """
    predictions, labels = predict(
        model, data, batch_size=batch_size, device=device, dtype=dtype, description=description
    )
    return value_of(predictions, labels, metric)


def value_of(predictions: Sequence[int], labels: Sequence[int], metric: str) -> float:
    """Return the value of a metric for predicted and true classes."""
    return float(load_metric(metric).compute(predictions=predictions, references=labels)[metric])


def predict(
    model: Callable[[Tensor], Tensor],
    data: Dataset[dict[str, Any]],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    description: str = "evaluating",
) -> tuple[list[int], list[int]]:
    """Return the predicted and the true class of every example, in order.

    In a distributed run every process answers for its share and gets the answers of all, each example's once. The
    global random state stays as it is: scoring between two epochs does not change the second.

    Args:
        model: pixel values [B, 3, S, S] to logits [B, classes]; a module should be in evaluation mode.
        data: items with ``pixel_values`` and ``labels``.
        batch_size: images a forward.
        device: where the images go.
        dtype: autocast precision; float32 means none.
        description: label of the progress bar.

    Raises:
        TrainingError: where a logit is NaN or infinite.
    """
    device = torch.device(device)
    number = len(data)  # type: ignore[arg-type]
    positions = processes.share(number)
    own = data if processes.count() == 1 else Subset(data, positions)
    loader = DataLoader(own, batch_size=batch_size, generator=torch.Generator())
    finite = torch.ones((), dtype=torch.bool, device=device)
    answers: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=None):
            logits = model(batch["pixel_values"].to(device))
            finite &= logits.isfinite().all()
            answers.append(logits.argmax(-1))
            labels.append(batch["labels"])
    shares = processes.gathered(
        (positions, torch.cat(answers).tolist(), torch.cat(labels).tolist(), bool(finite)),
    )
    if not all(fine for *_, fine in shares):
        raise TrainingError("the model gives logits that are NaN or infinite: it cannot be scored")
    found = {
        position: (answer, label)
        for places, predicted, true, _ in shares
        for position, answer, label in zip(places, predicted, true, strict=True)
    }
    ordered = [found[position] for position in range(number)]
    return [answer for answer, _ in ordered], [label for _, label in ordered]
