"""Exact match: the share of answers that equal the reference, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from pyra.errors import DataError
from pyra.tasks.metrics.base import InMemoryMetric

_DESCRIPTION = (
    "Share of answers that equal the reference answer exactly, between 0 and 1 (higher is better). Answers are "
    "compared as they are given: what they are read from, and how numbers are written, is settled before."
)

_INPUTS = """
Args:
    predictions (`list` of `str`): answers; an empty text stands for none.
    references (`list` of `str`): right answers.
"""


_CITATION = """\
@inproceedings{rajpurkar2016squad,
  title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={EMNLP}, year={2016}
}
"""


class ExactMatch(InMemoryMetric):
    """Modifications: ``compute`` returns ``{"exact_match": share of equal texts, 0..1}``."""

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": texts, "references": texts}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        if len(references) == 0:
            raise DataError("exact match of no answers is undefined: the split is empty")
        equal = sum(given == right for given, right in zip(predictions, references, strict=True))
        return {"exact_match": equal / len(references)}
