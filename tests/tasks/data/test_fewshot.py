"""Few-shot draws, and draws by class."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from pyra.errors import ConfigError, DataError
from pyra.tasks.data.draws import few_of_each, stratified
from pyra.tasks.data.fewshot import few_shot
from pyra.tasks.data.task import Task, load_task
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import task_for, task_of_run


@pytest.fixture(scope="module")
def demo() -> Task:
    return load_task("demo")


def names(task: Task, split: str) -> list[str]:
    return list(task.splits[split]["source"][:])


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16, 3])
def test_so_many_of_each_class(demo: Task, shots: int) -> None:
    few = few_shot(demo, shots)
    assert set(Counter(few.splits["train"]["label"][:]).values()) == {shots} and len(few.splits["train"]) == 10 * shots
    there = Counter(demo.splits["validation"]["label"][:])
    assert Counter(few.splits["validation"]["label"][:]) == {label: min(shots, n) for label, n in there.items()}
    assert few.splits["test"] is demo.splits["test"] and few.name == f"demo-{shots}shot"
    assert len(demo.splits["train"]) == 1000, "the task itself stays"


def test_fewer_are_among_more_and_a_seed_is_a_draw(demo: Task) -> None:
    for split in ("train", "validation"):
        draws = [set(names(few_shot(demo, shots), split)) for shots in (1, 2, 4, 8, 16)]
        assert all(small < large for small, large in itertools.pairwise(draws))
    assert names(few_shot(demo, 4), "train") == names(few_shot(demo, 4), "train")
    others = [set(names(few_shot(demo, 4, seed), "train")) for seed in (0, 1, 2)]
    assert len(others[0] & others[1]) < 20 and len(others[1] & others[2]) < 20


def test_the_draw_stays_the_same_in_all_releases() -> None:
    """A changed draw would change the results of every few-shot run."""
    labels = [row % 3 for row in range(30)]
    assert few_of_each(labels, 2, 0, "train") == [0, 4, 6, 19, 23, 26]


def test_a_task_in_parts_never_chooses_on_what_trained_it() -> None:
    task = load_task("dsprites_ori")
    few = few_shot(task, 2)
    assert names(few, "train") == names(few, "train800") and len(few.splits["train"]) == 32
    assert set(names(few, "train")) <= set(names(task, "train800"))
    assert names(few, "validation") == names(few, "val200") and set(names(few, "val200")) <= set(names(task, "val200"))
    assert max(Counter(few.splits["val200"]["label"][:]).values()) == 2


def test_classes_with_too_few_images_are_named(demo: Task) -> None:
    with pytest.raises(DataError, match=r"10 of 10 .* fewer than 101 images in train: dress \(100\).* 5 more"):
        few_shot(demo, 101)
    rows = demo.splits["train"]
    without = rows.select([row for row, label in enumerate(rows["label"][:]) if label != 3])
    missing = dataclasses.replace(demo, splits={**demo.splits, "train": without})
    with pytest.raises(DataError, match=r"1 of 10 .* outwear \(0\); a class without any cannot be learned"):
        few_shot(missing, 1)
    with pytest.raises(DataError, match="--shots is 0"):
        few_shot(demo, 0)


def test_options() -> None:
    few = task_for(RunOptions(rate=0.5, shots=2, shots_seed=7))
    assert names(few, "train") == names(few_shot(load_task("demo"), 2, 7), "train")
    with pytest.raises(ConfigError, match=r"--shots must be above 0.*--shots-seed must be in"):
        RunOptions(rate=0.5, shots=0, shots_seed=-1)
    with pytest.raises(ConfigError, match="--shots-seed goes with --shots"):
        RunOptions(rate=0.5, shots_seed=1)


def test_a_run_records_what_it_was_trained_on(tmp_path: Path, tiny_backbone: Path) -> None:
    from pyra.tasks.training import train

    options = RunOptions(
        backbone=str(tiny_backbone), method="linear", shots=1, epochs=1, device="cpu", output=str(tmp_path / "run")
    )
    result = train(options)
    assert result.task == "demo-1shot"
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert recorded["splits"]["train"]["images"] == 10 and recorded["splits"]["test"]["images"] == 372
    labels = list(load_task("demo").labels)
    assert task_of_run(tmp_path / "run", options, labels).name == "demo-1shot"
    with pytest.raises(DataError, match="the train split of demo-1shot is not the one"):
        task_of_run(tmp_path / "run", dataclasses.replace(options, shots_seed=1), labels)


# draws of a part with the shares of the whole


def test_stratified_parts() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 10
    parts = stratified(labels, {"train": 80, "val": 20}, seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 80, "val": 20}
    assert not set(parts["train"]) & set(parts["val"])
    assert Counter(labels[row] for row in parts["train"]) == {0: 72, 1: 7, 2: 1}
    assert Counter(labels[row] for row in parts["val"])[0] == 18
    assert stratified(labels, {"train": 80, "val": 20}, seed=1) != parts


def test_every_class_trains_and_none_is_always_the_first() -> None:
    rare = [0] * 9990 + [1] * 9 + [2]
    assert set(Counter(rare[row] for row in stratified(rare, {"train": 100}, 0)["train"])) == {0, 1, 2}
    many = [row % 397 for row in range(3970)]
    chosen = stratified(many, {"train": 800, "val": 200}, 0)
    assert set(Counter(many[row] for row in chosen["train"]).values()) == {2, 3}
    assert {many[row] for row in chosen["val"]} != set(range(200)), "not simply the first classes"
    assert sorted(stratified([0, 1] * 5, {"all": 10}, 0)["all"]) == list(range(10))
    with pytest.raises(ValueError, match="11 images are needed, there are 10"):
        stratified([0, 1] * 5, {"all": 11}, 0)
