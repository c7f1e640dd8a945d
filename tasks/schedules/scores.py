"""What a search makes best: the score of a merged model on validation images, never on the test split.

Of a backbone without a trained head that is a linear probe on its unmerged features: how well the merged features go
on saying what the unmerged ones said. Of a run it is the run's own answer, with its adapter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyra.backbones import set_rate, wrap, wrapped_config
from pyra.config import PyraConfig
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.schedules.calibration import pooled_features
from pyra.tasks.schedules.costs import private_copy
from pyra.tasks.scoring import value_of

RIDGE = 0.1
"""Penalty of the probe, as a share of the number of images; its inputs are standardised."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features [M, C], in closed form: nothing in it is random."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fitted(cls, features: Tensor, labels: Tensor, classes: int) -> Probe:
        """Fit the classes by ridge regression.

        Args:
            features: [M, C].
            labels: [M], class indices.
            classes: their number.
        """
        values = features.double()
        mean, std = values.mean(0), values.std(0, correction=0).clamp(min=1e-6)
        inputs = (values - mean) / std
        wanted = F.one_hot(labels, classes).double()
        bias = wanted.mean(0)
        penalty = RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (wanted - bias))
        return cls(mean, std, weight, bias)

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores [M, classes] of features [M, C]."""
        return ((features.double() - self.mean) / self.std) @ self.weight + self.bias


def features_of(model: nn.Module, data: ImageDataset, batch_size: int = 32, name: str = "features") -> Tensor:
    """Return what the head of a model sees of each image, [M, C] on the CPU, in the model's device and precision."""
    like = next(model.parameters())
    parts = [
        pooled_features(model, batch["pixel_values"].to(like.device, like.dtype)).float().cpu()
        for batch in tqdm(DataLoader(data, batch_size=batch_size), desc=name, unit="batch", leave=False, disable=None)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class ProbeScore:
    """Score of a backbone that merges untrained: a probe of unmerged training features reads the merged ones.

    Attributes:
        model: plain, on its device.
        config: how tokens are merged; its rate or schedule is not read.
        probe: fitted to features of the plain model.
        data: validation images.
        metric: of the task.
    """

    model: nn.Module
    config: PyraConfig
    probe: Probe
    data: ImageDataset
    metric: str = "accuracy"
    batch_size: int = 32

    def answers(self, schedule: list[int]) -> list[int]:
        """Return the predicted class of each image."""
        merging = replace(
            self.config, schedule=schedule, rate=None, rate_range=None, reactivation=False, scaled_gates=False
        )
        features = features_of(wrap(private_copy(self.model), merging), self.data, self.batch_size, "scoring")
        found: list[int] = self.probe(features).argmax(1).tolist()
        return found

    def __call__(self, schedule: list[int]) -> float:
        """Return the score of a schedule."""
        return value_of(self.answers(schedule), self.data.labels, self.metric)


@dataclass(frozen=True)
class RunScore:
    """Score of a trained run, its adapter read at any schedule.

    Attributes:
        model: as :func:`pyra.tasks.runs.load_run` gives it, on its device; left at the schedule it was scored at last.
        config: how tokens are merged where the run merges none.
        data: validation images.
        metric: of the task.
    """

    model: nn.Module
    config: PyraConfig
    data: ImageDataset
    metric: str = "accuracy"
    batch_size: int = 32

    def __call__(self, schedule: list[int]) -> float:
        """Return the score of a schedule."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # another rate than it was trained for: that is the question
            if wrapped_config(self.model) is None:
                wrap(self.model, replace(self.config, schedule=schedule, rate=None, rate_range=None))
            else:
                set_rate(self.model, schedule=schedule)
        like = next(self.model.parameters())
        answers: list[int] = []
        with torch.inference_mode():
            for batch in tqdm(
                DataLoader(self.data, batch_size=self.batch_size), desc="scoring", leave=False, disable=None
            ):
                answers += self.model(batch["pixel_values"].to(like.device, like.dtype)).argmax(-1).tolist()
        return value_of(answers, self.data.labels, self.metric)


def trials_file(output: str | Path) -> Path:
    """Return the journal of the search whose outcome is written to ``output``."""
    output = Path(output)
    return output.with_name(f"{output.stem}.trials.jsonl")
