"""Which images choose, and which candidate and epoch is chosen."""

from __future__ import annotations

import pytest

from pyra.errors import ConfigError
from pyra.tasks.data.fewshot import few_shot
from pyra.tasks.data.task import load_task
from pyra.tasks.protocols.choosing import Choice, Trial, choose, choosing_splits
from pyra.tasks.protocols.options import ExperimentOptions


def sources(rows: object) -> set[str]:
    return set(rows["source"][:])  # type: ignore[index]


@pytest.mark.slow  # prepares and trains on each task
@pytest.mark.parametrize("name", ["demo", "dsprites_ori"])
def test_no_test_image_chooses_or_trains(name: str) -> None:
    task = load_task(name)
    parts = choosing_splits(task)
    training, validation, whole = map(sources, (parts.training, parts.validation, parts.whole))
    assert not training & validation
    assert training | validation == whole
    assert not whole & sources(task.splits["test"])
    if name == "dsprites_ori":
        assert (len(training), len(validation), parts.origin) == (800, 200, "val200")
    else:
        assert (len(training), len(validation)) == (1000, 341)


def test_a_task_without_validation_images_gives_a_fifth(tmp_path: object) -> None:
    task = load_task("demo")
    splits = {"train": task.splits["train"], "test": task.splits["validation"], "validation": task.splits["validation"]}
    parts = choosing_splits(type(task)("x", task.labels, splits))  # the test split is the validation split
    assert (len(parts.training), len(parts.validation)) == (800, 200)
    assert sources(parts.training) | sources(parts.validation) == sources(task.splits["train"])
    assert parts.origin.startswith("a fifth of the training split")
    again = choosing_splits(type(task)("x", task.labels, splits))
    assert parts.validation["source"][:] == again.validation["source"][:]


def test_few_shot_trains_on_as_many_in_the_end() -> None:
    parts = choosing_splits(few_shot(load_task("demo"), 4), few_shot=True)
    assert len(parts.whole) == len(parts.training) == 40


def test_the_best_epoch_of_the_best_candidate() -> None:
    trials = [
        Trial({"lr": 1.0}, [(1.0, 0.5), (2.0, 0.7), (3.0, 0.7)]),
        Trial({"lr": 2.0}, [(1.0, 0.7), (2.0, 0.1)]),
        Trial({"lr": 3.0}, []),  # diverged
    ]
    assert choose(trials, higher_is_better=True) == Choice({"lr": 1.0}, 2.0, 0.7)
    assert choose(trials, higher_is_better=False) == Choice({"lr": 2.0}, 2.0, 0.1)


def test_candidates() -> None:
    options = ExperimentOptions(
        method="lora", protocol="validation", tune="lr=1e-3:3e-3,scaled-gates=false,ema=0.9:0.99,rank=4"
    )
    twice = ExperimentOptions(method="lora", protocol="validation", tune="lr=1e-3:0.001:3e-3")
    assert [changes["lr"] for changes in twice.candidates()] == [1e-3, 3e-3]
    with pytest.raises(ConfigError, match="it takes rank, dropout"):
        ExperimentOptions(method="lora", protocol="validation", tune="foo=1:2")
    assert options.candidates()[1] == {"lr": 1e-3, "scaled_gates": False, "ema": 0.99, "rank": 4}
    assert len(options.candidates()) == 4
    assert options.number_of_runs() == 3
    assert options.run("x", lr=7.0).lr == 7.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune": "lr=1e-3"}, "--tune goes with --protocol"),
        ({"protocol": "validation", "tune": "lrr=1"}, "did you mean 'lr'"),
        ({"protocol": "validation", "tune": "lr"}, "as in lr=1e-3:3e-3"),
        ({"protocol": "validation", "tune": "task=demo"}, "is no option"),
        ({"protocol": "validation", "tune": "lr=fast"}, "'fast' is not a number"),
        ({"protocol": "validation", "tune": "lr=1,lr=2"}, "twice"),
        ({"protocol": "validation", "tune": "lr=-1:1"}, "--lr must be above 0"),
        ({"protocol": "published", "patience": 2}, "--patience goes with --protocol validation"),
        ({"seeds": 0}, "--seeds must be a positive number"),
        ({"protocol": "val"}, "--protocol must be one of validation, published"),
    ],
)
def test_wrong_options(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExperimentOptions(method="lora", **changes)  # type: ignore[arg-type]
