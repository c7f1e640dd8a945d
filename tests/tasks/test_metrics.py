import os

import numpy as np
import pytest

from pyra.errors import DataError
from pyra.tasks.metrics import METRICS, load_metric


def test_accuracy_equals_the_value_computed_by_hand():
    result = load_metric("accuracy").compute(predictions=[3, 1, 2, 0, 0], references=[3, 1, 0, 0, 1])
    assert result == {"accuracy": pytest.approx(3 / 5)}


def test_accuracy_of_batches_is_that_of_all_examples():
    metric = load_metric("accuracy")
    metric.add_batch(predictions=np.array([1, 2, 3]), references=np.array([1, 2, 0]))
    metric.add_batch(predictions=np.array([1]), references=np.array([0]))
    assert metric.compute() == {"accuracy": 0.5}


def test_a_metric_can_be_used_again_from_zero():
    metric = load_metric("accuracy")
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert metric.compute(predictions=[1], references=[0]) == {"accuracy": 0.0}


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(DataError, match="no predictions"):
        load_metric("accuracy").compute(predictions=[], references=[])


def test_exact_match_compares_texts_as_they_are():
    result = load_metric("exact_match").compute(predictions=["7", "", "7.0", "a"], references=["7", "7", "7", "a"])
    assert result == {"exact_match": 0.5}
    with pytest.raises(DataError, match="no answers"):
        load_metric("exact_match").compute(predictions=[], references=[])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_describes_itself_and_writes_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = load_metric(name)
    metric = type(metric)(cache_dir=str(tmp_path))
    one = {"accuracy": [0]}.get(name, ["0"])
    metric.compute(predictions=one, references=one)
    assert metric.name == name
    assert metric.description and metric.citation and set(metric.features) == {"predictions", "references"}
    assert os.listdir(tmp_path) == []


def test_unknown_metric_gets_a_suggestion():
    with pytest.raises(DataError, match=r"unknown metric 'acuracy' \(did you mean 'accuracy'\?\)"):
        load_metric("acuracy")
