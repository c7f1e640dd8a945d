"""Runs that differ in their seed only are one row."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyra.files import write_json
from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.comparable import missing_probes, warnings
from pyra.tasks.reports.groups import Group, differences, group, majority_groups, seeds_text
from pyra.tasks.reports.summary import records, summary


def grouped(*rows, by_seed: bool = False) -> list[Group]:
    return group([Found(Path(f"run{i}") / "result.json", row) for i, row in enumerate(rows)], by_seed)[0]


def test_seeds_are_one_row_with_mean_and_deviation(make) -> None:
    (one,) = grouped(*(make(value=value, seed=seed) for seed, value in ((2, 0.6), (0, 0.5), (1, 0.4))))
    assert one.seeds == [0, 1, 2]
    assert (one.mean, one.deviation) == (pytest.approx(0.5), pytest.approx(0.1))
    assert one.average("images_per_second") == 100 and one.average("speedup") is None
    assert grouped(make())[0].deviation is None


def test_the_likelihood_of_right_answers_is_a_mean_over_seeds_too(make) -> None:
    table = summary(grouped(make(answer_nll=0.2, seed=0), make(answer_nll=0.4, seed=1), make("lora")))
    cells = [dict(zip(table.headers, line, strict=True)) for line in table.cells]
    assert [line["answer NLL"] for line in cells] == ["0.30", "-"]
    assert records(grouped(make(answer_nll=0.2)))[0]["answer_nll"] == 0.2
    assert "answer NLL" not in summary(grouped(make())).headers


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"}, {"task_version": "2"}, {"test_sha256": "b"}, {"train_sha256": "b"}, {"method": "lora"},
        {"rate": 0.5}, {"schedule": [3]}, {"macs": 3}, {"backbone": "other"}, {"weights_sha256": "b"}, {"epochs": 3},
        {"image_size": 96}, {"protocol": "published"}, {"selection": "other"}, {"settings": {"lr": 0.1}},
        {"metric": "f1"}, {"adapter": {"peft": {"r": 4}}}, {"split": "validation"}, {"preprocessing": "crop"},
        {"batch_size": 8},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_else_differs_keeps_runs_apart(make, change: dict[str, object]) -> None:
    same = {"settings": {"lr": 0.2}, "adapter": {"peft": {"r": 8}}, "train_sha256": "a", "test_sha256": "a"}
    assert len(grouped(make(seed=0, **same), make(seed=1, **same))) == 1
    assert len(grouped(make(seed=0, **same), make(seed=1, **(same | change)))) == 2


def test_what_was_chosen_may_differ_between_seeds(make) -> None:
    def row(seed: int, lr: float, epoch: float, decay: float = 0.0, epochs: float = 9.0):
        settings = {"lr": lr, "weight_decay": decay}
        return make(
            seed=seed, epochs=epochs, settings=settings, protocol="validation", chosen={"lr": lr, "epoch": epoch}
        )

    assert len(grouped(row(0, 0.1, 3), row(1, 0.2, 4))) == 1
    assert len(grouped(row(0, 0.1, 3), row(1, 0.2, 4, decay=0.1))) == 2
    assert len(grouped(row(0, 0.1, 3), row(1, 0.2, 4, epochs=99.0))) == 2  # the schedule was given, not chosen


def test_few_shot_draws_are_runs_of_one_method(make) -> None:
    def row(seed: int, draw: int, shots: int = 4):
        settings = {"shots": shots, "shots_seed": draw}
        return make(seed=seed, settings=settings, train_sha256=f"{shots} {draw}", value=0.1 * (seed + draw))

    (one,) = grouped(row(0, 0), row(0, 1), row(1, 1), row(1, 1))
    assert one.draws == [(0, 0), (0, 1), (1, 1)] and one.mean == pytest.approx(0.1)
    assert seeds_text(one) == "0,0 draw 1,1 draw 1"
    assert len(grouped(row(0, 0), row(0, 0, shots=8))) == 2
    plain = [make(settings={"shots": None, "shots_seed": draw}) for draw in (0, 1)]
    assert len(grouped(*plain)) == 2


def test_a_seed_that_is_there_twice_counts_once_and_is_told(make) -> None:
    old, new = ({"date": f"202{year}-01-01T00:00:00+00:00"} for year in (5, 6))
    rows = [make(value=0.6, environment=new), make(value=0.2, environment=old), make(value=0.1)]
    found = [Found(Path(name) / "result.json", row) for name, row in zip("abc", rows, strict=True)]
    (one,), notes = group(found)
    assert (one.mean, one.seeds) == (0.6, [0])
    assert notes == ["seed 0 of pyra on demo is there 3 times (a, b, c): the newest counts"]
    again = Found(Path("a") / "evaluation.json", make(value=0.7, environment={"date": "2027-01-01"}))
    (one,), notes = group([found[0], again])
    assert (one.mean, notes) == (0.7, [])


def test_rows_that_look_the_same_say_how_they_differ(make) -> None:
    groups = grouped(
        make(settings={"lr": 0.1, "rank": 8}),
        make(settings={"lr": 0.2, "rank": 8}, seed=1, test_sha256="f" * 64),
        make(method="lora"),
    )
    assert differences(groups) == ["test_sha256=null, lr=0.1", f"test_sha256={'f' * 8}, lr=0.2", ""]
    adapters = grouped(*(make(adapter={"peft": {"r": r}, "pyra": None}) for r in (4, 8)))
    assert differences(adapters) == ["r=4", "r=8"]


def test_numbers_at_the_edge(make) -> None:
    (one,) = grouped(*(make(value=value, seed=seed) for seed, value in enumerate((1.7e308, -1.7e308, 1.7e308))))
    assert one.mean == pytest.approx(1.7e308 / 3) and one.deviation is None


def test_majority_class_once_for_each_set_of_images(make) -> None:
    rows = [make(majority_value=0.12, test_sha256=digest, seed=seed) for seed, digest in enumerate("aab")]
    groups = majority_groups(grouped(*rows, make(task="other")))
    assert [(one.row.method, one.mean, one.row.test_sha256, one.seeds) for one in groups] == [
        ("majority class", 0.12, "a", []), ("majority class", 0.12, "b", [])
    ]  # fmt: skip


def test_majority_classes_of_several_training_sets_are_told_apart(make) -> None:
    ways = [
        (0.1, "fixed", {"shots": None}), (0.2, "validation", {"shots": None}), (0.3, "validation", {"shots": 4}),
    ]  # fmt: skip
    rows = [make(majority_value=value, protocol=name, settings=settings) for value, name, settings in ways]
    assert differences(majority_groups(grouped(*rows))) == [
        "counted_in=training, shots=null", "counted_in=training + validation, shots=null",
        "counted_in=training, shots=4",
    ]  # fmt: skip


def test_rows_that_cannot_be_compared_are_named(make) -> None:
    known = {"settings": {}, "test_sha256": "a" * 64}
    assert (
        warnings(grouped(make(**known), make(method="lora", **known), make(task="x", settings={}, test_sha256="c")))
        == []
    )
    (line,) = warnings(grouped(make(**known), make(method="lora", settings={}, test_sha256="b" * 64)))
    assert "demo" in line and "test_sha256" in line and f"{'a' * 12}: pyra" in line and f"{'b' * 12}: lora" in line
    for name, values in (("task_version", "12"), ("preprocessing", ("squash", "crop")), ("metric", ("f1", "accuracy"))):
        (line,) = warnings(grouped(*(make(**(known | {name: value})) for value in values)))
        assert name in line and all(value in line for value in values)
    shots = {"settings": {"shots": 4}, "test_sha256": "a"}
    few = [make(**shots, train_sha256=str(seed), seed=seed) for seed in (0, 1)]
    assert warnings(grouped(*few)) == []
    (line,) = warnings(grouped(*few, make("lora", settings={}, test_sha256="a", train_sha256="c")))
    assert "training images (train_sha256: 4 a class: pyra; c: lora)" in line
    assert warnings(grouped(make(**known), make(split="validation", settings={}, test_sha256="b"))) == []
    (line,) = warnings(grouped(make(), make(seed=1), make(**known)))
    assert line.startswith("2 of 3 runs do not say")


def test_missing_linear_probes_come_with_their_command(make) -> None:
    rows = [
        make(backbone="demo"),
        make(method="linear", backbone="demo"),
        make(backbone="vit small", image_size=112),
        make(task="my photos", backbone="demo", data_source="my photos"),
        make(task="dtd", backbone="demo", data_source="vtab/dtd", settings={"limit": 60}),
        make(task="demo-4shot", backbone="demo", settings={"shots": 4}),
    ]
    first, second, third, fourth = missing_probes(grouped(*rows))
    assert first == (
        "no linear probe of vit small on demo: pyra train --task demo --backbone 'vit small' --image-size 112 "
        "--method linear --output runs/demo-linear"
    )
    assert "--data 'my photos'" in second and "--backbone" not in second
    assert "--task dtd --root FOLDER --limit 60 --method linear" in third
    assert "pyra train --task demo --shots 4 --method linear --output runs/demo-4shot-linear" in fourth
    many = missing_probes(grouped(*(make(task=f"t{i}") for i in range(9))))
    assert len(many) == 5 and many[-1] == "5 more linear probes are missing"


def test_a_backbone_by_two_paths_is_one(make) -> None:
    rows = [make(backbone=path, weights_sha256="a", seed=seed) for seed, path in enumerate(("vit", "/models/vit"))]
    assert len(grouped(*rows)) == 1
    probe = make("linear", backbone="../vit", weights_sha256="a")
    assert missing_probes(grouped(*rows, probe)) == []
    assert len(grouped(*(make(backbone=path, weights_sha256="random") for path in ("vit", "/models/vit")))) == 2


def test_a_suggested_command_names_the_data_as_it_lies(make, tmp_path: Path) -> None:
    write_json(tmp_path / "options.json", {"data": "/home/me/my photos"})
    row = make(task="my photos", data_source="my photos")
    (line,) = missing_probes(group([Found(tmp_path / "result.json", row)])[0])
    assert "--data '/home/me/my photos'" in line
