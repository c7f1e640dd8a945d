"""The result of a language task as a row of every table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import nn

from pyra.tasks.language.answering import Scored
from pyra.tasks.language.data import TextTask
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.results import RunResult, environment

ZERO_SHOT = "none"
"""Method of a backbone that nothing was trained for."""

_FIELDS = frozenset(field.name for field in dataclasses.fields(RunResult))


def language_result(
    task: TextTask,
    scored: Scored,
    model: nn.Module,
    options: LanguageOptions,
    device: torch.device,
    *,
    split: str,
    trained_parameters: int = 0,
    train_seconds: float | None = None,
    method: str | None = None,
    batch_size: int | None = None,
) -> RunResult:
    """Return the row of a model that was scored.

    Its MACs are those of one forward over an example of average length; nothing merges, so the rate is 0.
    """
    method = method or options.method
    size = batch_size or options.batch_size
    return RunResult(
        task=task.name,
        method=method,
        metric=task.card.metric,
        value=scored.value,
        macs=scored.macs,
        plain_macs=scored.macs,
        schedule=[0] * int(getattr(getattr(model, "config", None), "num_hidden_layers", 0)),
        rate=0.0,
        trained_parameters=trained_parameters,
        seed=options.seed,
        backbone=options.backbone,
        batch_size=size,
        epochs=None if method == ZERO_SHOT else options.epochs,
        train_seconds=train_seconds,
        num_test=len(scored.references),
        protocol=f"{split} split",
        environment=environment(str(device)),
        **_known(
            unit="examples",
            images_per_second=len(scored.references) / scored.seconds,
            throughput_batch_size=size,
            higher_is_better=task.card.higher_is_better,
            majority_value=majority(task, scored),
            task_version=task.card.version,
            data_source=task.source,
            split=split,
        ),
    )


def majority(task: TextTask, scored: Scored) -> float | None:
    """Return the score of always answering the most frequent training label; None without labels."""
    if not task.labels:
        return None
    (label, _), *_rest = Counter(example.label for example in task.splits["train"]).most_common(1)
    return sum(right == label for right in scored.references) / len(scored.references)


def _known(**values: Any) -> dict[str, Any]:
    """Keep what rows have a field for; without a unit, a speed would be read as images per second."""
    speeds = ("images_per_second", "throughput_batch_size")
    return {k: v for k, v in values.items() if k in _FIELDS and ("unit" in _FIELDS or k not in speeds)}
