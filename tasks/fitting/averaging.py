"""An exponential moving average of the trained weights (EMA): what is scored and saved where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class MovingAverage(TrainerCallback):
    """Keeps ``decay * average + (1 - decay) * weights`` after every optimiser step.

    The decay of step ``t`` is at most ``(1 + t) / (10 + t)``, so that a short training does not average its start in.
    Only what is trained is averaged: it costs as much memory again as the trained weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = {name: p.detach().float().clone() for name, p in _trained(model).items()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Take the new weights in."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = _trained(self.model)
        for name, average in self.average.items():
            self.average[name] = average.to(weights[name].device).lerp_(weights[name].float(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {name: average.cpu().clone() for name, average in self.average.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what a checkpoint kept."""
        self.average = {name: tensors[name] for name in self.average}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights for a while."""
        own = {name: p.detach().clone() for name, p in _trained(self.model).items()}
        self.settle()
        try:
            yield
        finally:
            _assign(self.model, own)

    def settle(self) -> None:
        """Give the model the averaged weights for good."""
        _assign(self.model, self.average)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in _trained(model).items():
        parameter.copy_(tensors[name])
