"""One adapter for every rate: which rate a training step runs at, and what the compressed passes learn from.

The sandwich rule is that of slimmable networks (arXiv 1903.05134, section 3.2), spread over steps: the lowest rate, the
highest and one between take turns, so that a step costs no more than one of a fixed rate.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.backbones import schedule_of, switch, wrapped_config, wrapped_schedule
from pyra.errors import ConfigError

RULES: tuple[str, ...] = ("sandwich", "uniform")


class RateSampler:
    """The rate of each training step, drawn from the range of a configuration.

    The draw depends on the seed and the number of the step alone: every process of a distributed run, and a resumed
    one, gets the same.

    It serves one model: schedules are kept.

    Args:
        rates: lowest and highest rate.
        rule: ``"sandwich"``, lowest, highest and one between in turn; ``"uniform"``, any.
        seed: of the draw.
        steps_between: number of rates strictly between the ends that may be drawn, evenly spread; schedules are whole
            tokens, so that few differ.

    Raises:
        ConfigError: for an unknown rule, or rates that do not rise.

    Example:
        >>> RateSampler([0.3, 0.8]).rate(0), RateSampler([0.3, 0.8]).rate(1)
        (0.3, 0.8)
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

    def rate(self, step: int) -> float:
        """Return the rate of a training step, counted from 0."""
        if self.rule == "sandwich" and step % 3 < 2:
            return (self.lowest, self.highest)[step % 3]
        draw = random.Random(f"{self.seed}/{step}")
        if self.rule == "sandwich":
            point = draw.randint(1, self.steps_between)
        else:
            point = draw.randint(0, self.steps_between + 1)
        return self.lowest + (self.highest - self.lowest) * point / (self.steps_between + 1)

    def apply(self, model: nn.Module, step: int) -> float:
        """Switch a model to the rate of a training step, and return it; each rate's schedule is solved once.

        Raises:
            ConfigError: for a model that is not wrapped.
        """
        config, rate = wrapped_config(model), self.rate(step)
        if config is None:
            raise ConfigError("only a model that merges tokens has rates: wrap or adapt it first")
        config = dataclasses.replace(config, rate=rate, schedule=None)
        if rate not in self._schedules:
            self._schedules[rate] = schedule_of(model, config)
        switch(model, config, self._schedules[rate])
        return rate


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
