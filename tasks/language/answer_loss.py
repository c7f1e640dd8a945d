"""How well a decoder expects the right answers: nats a token, and how sure a difference between two models is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pyra.errors import ConfigError
from pyra.tasks.language.data import Example
from pyra.tasks.language.scoring import log_likelihoods
from pyra.tasks.language.tokens import Answered, Encoder


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of answers.

    Attributes:
        nats: of each answer, summed over its tokens.
        tokens: of each answer.
    """

    nats: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats a token, over all tokens of all answers."""
        return sum(self.nats) / sum(self.tokens)

    def difference(self, other: AnswerLoss) -> tuple[float, float]:
        """Return how many nats a token more this is than another on the same answers, and the standard error of that.

        The error is that of a ratio over examples, in pairs.
        """
        pairs = list(zip(self.nats, other.nats, self.tokens, strict=True))
        mean = self.mean - other.mean
        residuals = [(own - theirs - mean * tokens) ** 2 for own, theirs, tokens in pairs]
        return mean, math.sqrt(sum(residuals)) / sum(self.tokens)


def answer_rows(
    encoder: Encoder, examples: Sequence[Example], max_length: int
) -> tuple[list[Answered], list[Example], int]:
    """Encode prompts with their answers and what ends a text.

    Returns:
        The rows, the example of each, and how many were longer than ``max_length`` and left out.

    Raises:
        ConfigError: where all are.
    """
    found = [encoder.answered(example.prompt, [example.answer])[0] for example in examples]
    rows = [Answered([*row.ids, *encoder.end], row.start) for row in found]
    kept = [(row, one) for row, one in zip(rows, examples, strict=True) if len(row.ids) <= max_length]
    if not kept:
        raise ConfigError(f"--max-length {max_length}: every example is longer, with its answer; raise it")
    return [row for row, _ in kept], [one for _, one in kept], len(rows) - len(kept)


def answer_loss(
    model: nn.Module, rows: Sequence[Answered], encoder: Encoder, *, batch_size: int, description: str
) -> AnswerLoss:
    """Measure a model on rows of :func:`answer_rows`; raises :class:`TrainingError` for logits that are no numbers."""
    found = log_likelihoods(model, rows, pad_id=encoder.pad_id, batch_size=batch_size, description=description)
    return AnswerLoss([-value for value in found], [len(row.ids) - row.start for row in rows])
