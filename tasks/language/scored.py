"""What the answers of a model are worth, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from pyra.tasks.language.data import Example, examples_digest
from pyra.tasks.language.scoring import AnswerNll, mean_nll


@dataclass(frozen=True)
class Scored:
    """What a model answered, and how well.

    Attributes:
        value: of the task's metric.
        references: right labels (numbers), or right answers.
        predictions: its own; -1 or an empty text where an answer held none.
        texts: what was generated, where it was.
        cut: examples that were longer than what is read.
        seconds: for all of them.
        macs: multiply-accumulates of a forward over as many tokens as an example has on average.
        plain_macs: the same with nothing merging.
        nlls: how unlikely each right answer is after its prompt, None for one that is longer than what the backbone
            reads; None where a head answers.
        generated: tokens that were generated for each answer, thoughts included, where any were.
    """

    value: float
    references: list[int] | list[str]
    predictions: list[int] | list[str]
    texts: list[str] | None
    cut: int
    seconds: float
    macs: int
    plain_macs: int
    nlls: list[AnswerNll | None] | None = None
    generated: list[int] | None = None

    @property
    def nll(self) -> float | None:
        """Mean negative log-likelihood of the right answers, in nats a token."""
        return mean_nll(self.nlls or [])

    @property
    def answer_tokens(self) -> float | None:
        """Mean number of generated tokens."""
        return mean(self.generated) if self.generated else None

    def record(self, split: str, examples: Sequence[Example]) -> dict[str, Any]:
        """Return what ``predictions.json`` holds."""
        texts: dict[str, Any] = {} if self.texts is None else {"texts": self.texts}
        nlls = [(None, None) if one is None else one for one in self.nlls or []]
        right = (
            {} if self.nlls is None else {"answer_nats": [n for n, _ in nlls], "answer_tokens": [t for _, t in nlls]}
        )
        if self.generated is not None:
            texts["generated_tokens"] = self.generated
        return {
            "split": split,
            "sha256": examples_digest(examples),
            "labels": self.references,
            "predictions": self.predictions,
            "cut": self.cut,
            **texts,
            **right,
        }

    def notes(self) -> list[str]:
        """Say what was not as it should be."""
        return [f"examples longer than what is read, cut: {self.cut}"] if self.cut else []
