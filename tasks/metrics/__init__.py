"""Evaluation metrics as `evaluate` modules of this package: nothing is fetched from a hub at run time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pyra.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import evaluate

METRICS = {
    "accuracy": "pyra.tasks.metrics.accuracy:Accuracy",
    "exact_match": "pyra.tasks.metrics.exact_match:ExactMatch",
}
"""Every metric by name: the module and class that compute it."""


def load_metric(name: str) -> evaluate.Metric:
    """Return a new metric; predictions are kept in memory and no file is written.

    Raises:
        DataError: unknown name.

    >>> load_metric("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 0.75}
    """
    if name not in METRICS:
        raise DataError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}; the metrics are {', '.join(METRICS)}")
    module, _, attribute = METRICS[name].partition(":")
    metric: evaluate.Metric = getattr(import_module(module), attribute)()
    return metric
