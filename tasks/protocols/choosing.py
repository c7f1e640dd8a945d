"""Which images choose, which train in the end, and the choice itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from pyra.tasks.data.draws import stratified
from pyra.tasks.data.task import Task

SHARE, SEED = 0.2, 0
_PARTS = ("train800", "val200")


@dataclass(frozen=True)
class ChoosingSplits:
    """The images of a protocol.

    Attributes:
        training: trained on while choosing.
        validation: what chooses.
        whole: trained on in the end.
        origin: where the validation images come from, in words.
    """

    training: datasets.Dataset
    validation: datasets.Dataset
    whole: datasets.Dataset
    origin: str


def choosing_splits(task: Task, few_shot: bool = False) -> ChoosingSplits:
    """Return what a protocol trains and chooses on; never an image of the test split.

    VTAB's ``train800`` and ``val200``, or the training and the validation split of a task. A task without one gives
    a fifth of its training images, class by class, always the same. In the end both train, but in few-shot settings,
    whose number of training images is what they are about.
    """
    splits = task.splits
    if all(name in splits for name in _PARTS):
        training, validation, origin = splits[_PARTS[0]], splits[_PARTS[1]], _PARTS[1]
    elif "validation" in splits and splits["validation"] is not splits["test"]:
        training, validation, origin = splits["train"], splits["validation"], "the validation split"
    else:
        labels = splits["train"]["label"][:]
        held = round(SHARE * len(labels))
        parts = stratified(labels, {"training": len(labels) - held, "validation": held}, SEED)
        training, validation = (splits["train"].select(rows) for rows in parts.values())
        origin = f"a fifth of the training split (seed {SEED})"
    whole = training if few_shot else datasets.concatenate_datasets([training, validation])
    return ChoosingSplits(training, validation, whole, origin)


@dataclass(frozen=True)
class Trial:
    """One candidate: what it changes, and epoch and score of each of its epochs."""

    changes: dict[str, Any]
    scores: list[tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """What was chosen: a candidate, the epoch to stop after, and the score that chose it."""

    changes: dict[str, Any]
    epoch: float
    score: float


def choose(trials: Sequence[Trial], higher_is_better: bool) -> Choice:
    """Return the best epoch of the best candidate; of equals the first candidate, and its earliest epoch."""
    sign = 1 if higher_is_better else -1
    ranked = [
        (sign * score, -number, -epoch, Choice(trial.changes, epoch, score))
        for number, trial in enumerate(trials)
        for epoch, score in trial.scores
    ]
    return max(ranked, key=lambda entry: entry[:3])[3]
