"""One adapter for every rate: which rate a training step runs at, and what the compressed passes learn from.

The sandwich rule is that of slimmable networks (arXiv 1903.05134, section 3.2) on shares of a batch: most images at the
lowest rate, some at the highest or one between in turn, so that a step costs about 1.6 of one rate and not three.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.backbones import schedule_of, switch, wrapped_config, wrapped_schedule
from pyra.errors import ConfigError

RULES: tuple[str, ...] = ("sandwich", "uniform")


@dataclass(frozen=True)
class StepPart:
    """Some images of a training step, at one rate.

    Attributes:
        rate: share of the MACs to save.
        start: where its images begin, as a share of the batch.
        stop: where they end.
        weight: of its mean loss; the weights of a step add up to 1.
    """

    rate: float
    start: float = 0.0
    stop: float = 1.0
    weight: float = 1.0

    def rows(self, images: int) -> slice:
        """Return the images of a batch of so many; at least one."""
        return slice(math.floor(self.start * images), math.ceil(self.stop * images))


class RateSampler:
    """The rates of each training step, drawn from the range of a configuration.

    A step has parts: each is a forward and a backward pass of its own, before the optimiser's step.

    The draw depends on the seed and the number of the step alone: every process of a distributed run, and a resumed
    one, gets the same.

    It serves one model: schedules are kept.

    Args:
        rates: lowest and highest rate.
        rule: ``"sandwich"``, three quarters of the images at the lowest rate with three quarters of the weight, and
            half of them at the highest or one between in turn; ``"uniform"``, all at any rate.
        seed: of the draw.
        steps_between: number of rates strictly between the ends that may be drawn, evenly spread; schedules are whole
            tokens, so that few differ.

    Raises:
        ConfigError: for an unknown rule, or rates that do not rise.

    Example:
        >>> [part.rate for part in RateSampler([0.3, 0.8]).parts(1)]
        [0.3, 0.8]
    """

    def __init__(self, rates: list[float], rule: str = "sandwich", seed: int = 0, steps_between: int = 15) -> None:
        if rule not in RULES:
            raise ConfigError(f"the rule of an elastic training must be one of {', '.join(RULES)}, got {rule!r}")
        if not isinstance(rates, (list, tuple)):
            raise ConfigError(f"an elastic training needs two rates, such as [0.3, 0.8], got {type(rates).__name__}")
        numbers = [rate for rate in rates if isinstance(rate, (int, float))]
        if len(numbers) != 2 or len(rates) != 2 or not numbers[0] < numbers[1]:
            raise ConfigError(f"an elastic training needs a lowest and a higher rate, got {rates}")
        if steps_between < 1:
            raise ConfigError(f"steps_between must be at least 1, got {steps_between}")
        self.lowest, self.highest = numbers
        self.rule, self.seed, self.steps_between = rule, seed, steps_between
        self._schedules: dict[float, list[int]] = {}

    def parts(self, step: int) -> tuple[StepPart, ...]:
        """Return the parts of a training step, counted from 0."""
        draw = random.Random(f"{self.seed}/{step}")
        if self.rule == "uniform":
            return (StepPart(self._between(draw.randint(0, self.steps_between + 1))),)
        other = self.highest if step % 2 else self._between(draw.randint(1, self.steps_between))
        # With one rate a step, in turn, steps at high rates pull the weights away from what the lowest one needs
        # (results/README.md has what either gives).
        return StepPart(self.lowest, 0.0, 0.75, 0.75), StepPart(other, 0.5, 1.0, 0.25)

    def _between(self, point: int) -> float:
        return self.lowest + (self.highest - self.lowest) * point / (self.steps_between + 1)

    def apply(self, model: nn.Module, rate: float) -> None:
        """Switch a model to the rate of a part; each rate's schedule is solved once.

        Raises:
            ConfigError: for a model that is not wrapped.
        """
        config = wrapped_config(model)
        if config is None:
            raise ConfigError("only a model that merges tokens has rates: wrap or adapt it first")
        config = dataclasses.replace(config, rate=rate, schedule=None)
        if rate not in self._schedules:
            self._schedules[rate] = schedule_of(model, config)
        switch(model, config, self._schedules[rate])


@contextmanager
def uncompressed(model: nn.Module) -> Iterator[None]:
    """Let a wrapped model run without merging, in evaluation mode and without gradients.

    Raises:
        ConfigError: for a model that is not wrapped.
    """
    config, schedule, training = wrapped_config(model), wrapped_schedule(model), model.training
    if config is None or schedule is None:
        raise ConfigError("only a model that merges tokens has an uncompressed pass: wrap or adapt it first")
    modes = [(module, module.training) for module in model.modules()] if training else []
    switch(model, config, [0] * len(schedule))
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        switch(model, config, schedule)
        for module, mode in modes:
            module.training = mode


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of predictions [B, classes] from a teacher's, mean over the batch."""
    student, target = F.log_softmax(logits.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True)
