"""Top-1 accuracy: the share of predictions that equal the reference."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from pyra.errors import DataError
from pyra.tasks.metrics.base import InMemoryMetric

_DESCRIPTION = (
    "Share of predicted class indices that equal the reference class index, between 0 and 1 (higher is better)."
)

_INPUTS = """
Args:
    predictions (`list` of `int`): predicted class indices.
    references (`list` of `int`): true class indices.
"""

_CITATION = """\
@article{russakovsky2015imagenet,
  title={ImageNet Large Scale Visual Recognition Challenge},
  author={Russakovsky, Olga and Deng, Jia and Su, Hao and others},
  journal={International Journal of Computer Vision},
  volume={115}, pages={211--252}, year={2015}
}
"""


class Accuracy(InMemoryMetric):
    """Modifications: ``compute`` returns ``{"accuracy": share of equal class indices, 0..1}``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        if len(references) == 0:
            raise DataError("accuracy of no predictions is undefined: the split is empty")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
