"""`pyra schedule`: the table, the file, what trains with it, and every error in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pyra.adapters import save_adapter
from pyra.backbones import geometry
from pyra.errors import ConfigError, OutputError, ScheduleError
from pyra.scripts.main import main
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import new_model, save_run, task_for
from pyra.tasks.schedules import costs, latency
from pyra.tasks.schedules.costs import LayerTimes, MeasuredCosts
from pyra.tasks.schedules.making import ScheduleOptions, make_schedule, parse_seconds
from pyra.tasks.schedules.record import parse_schedule, read_schedule


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["schedule", *arguments]) == 0
    return capsys.readouterr().out


def test_a_rate_and_what_trains_with_it(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "s.json"
    out = shown(capsys, "--backbone", str(tiny_backbone), "--rate", "0.4", "--output", str(file))
    record = json.loads(file.read_text())
    assert record["how"] == "rate" and record["target"] == {"rate": 0.4} and record["rate"] >= 0.4
    assert f"schedule: {','.join(map(str, record['schedule']))}\n" in out
    assert record["layers"][0]["tokens"] == 65
    assert sum(row["cost"] for row in record["layers"]) < record["macs"] < record["plain_macs"]
    assert record["environment"]["torch"] and "device" in record["environment"]
    assert str(tmp_path) not in file.read_text()
    options = RunOptions(backbone=str(tiny_backbone), method="tome", schedule=str(file))
    assert options.schedule == record["schedule"]
    assert asdict(options)["schedule"] == record["schedule"]  # a run keeps the list, not the file
    assert options.pyra_config().schedule == record["schedule"]
    from pyra.scripts.train import _parsed

    read = _parsed(["--backbone", str(tiny_backbone), "--method", "tome", "--schedule", str(file)])
    assert read.schedule == record["schedule"]
    assert _parsed(["--method", "tome", "--schedule", "8,7, 6"]).schedule == [8, 7, 6]


def test_a_speedup_is_predicted_and_measured(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(model, images, schedule, config, costs, rounds):
        predicted = latency.total(costs, schedule)
        return latency.Check(schedule, predicted, costs.plain / predicted, predicted, costs.plain)

    def measured(model, images, config, *, rounds):
        assert images.shape == (64, 3, 32, 32) and rounds == 1
        triples = tuple((n / 65, n / 65 + 0.01, 0.8 * n / 65 + 0.01) for n in (3, 65))
        times = LayerTimes((0, 1, 2), (3, 65), triples, triples[-1])
        return MeasuredCosts(geometry(model), 0.2, (times,), len(images), 1.0)

    monkeypatch.setattr(latency, "check", check)
    monkeypatch.setattr(costs, "measure_costs", measured)
    file = tmp_path / "s.json"
    arguments = ["--backbone", str(tiny_backbone), "--output", str(file), "--rounds", "1", "--batch-size", "64"]
    out = shown(capsys, *arguments, "--speedup", "1.2", "--method", "tome")
    record = json.loads(file.read_text())
    assert "taken: predicted" in out and "measured" in out and "batch 64" in out
    assert record["how"] == "latency" and record["measured"]["met"]
    assert record["predicted"]["speedup"] == pytest.approx(1.2, abs=0.01) and record["details"]["batch_size"] == 64
    assert len(record["details"]["costs"]["layers"][0]["merged"]) == 2
    ways = {"calibrated": ["--calibrate", "demo", "--images", "2"], "searched": ["--search", "--task", "demo"]}
    for how, more in ways.items():
        few = ["--trials", "1", "--limit", "8"] if how == "searched" else []
        shown(capsys, *arguments, "--speedup", "1.2", "--overwrite", *more, *few)
        record = json.loads(file.read_text())
        assert record["how"] == how and record["target"] == {"speedup": 1.2}
        assert record["predicted"]["speedup"] == pytest.approx(1.2, abs=0.02) and record["measured"]["met"]
    assert main(["schedule", *arguments, "--latency", "1us", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "at best on this device" in error and error.count("pyra: error") == 1
    assert json.loads(file.read_text()) == record


def test_a_calibration_is_deterministic(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--backbone", str(tiny_backbone), "--calibrate", "demo", "--images", "4", "--rate", "0.4"]
    files = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    out = shown(capsys, *arguments, "--output", str(files[0]))
    assert "drift" in out
    shown(capsys, *arguments, "--output", str(files[1]))
    shown(capsys, *arguments, "--output", str(files[2]), "--seed", "1")
    first, second, third = (json.loads(file.read_text()) for file in files)
    assert first["schedule"] == second["schedule"]
    assert first["details"]["calibration"]["drift"] == second["details"]["calibration"]["drift"]
    assert first["details"]["calibration"]["drift"] != third["details"]["calibration"]["drift"]
    assert first["rate"] == pytest.approx(0.4, abs=0.02) and first["rate"] >= 0.4


def test_a_search_never_sees_the_test_split(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyra.tasks import evaluation

    seen: list[str] = []
    real = evaluation.data_for

    def watched(model, task, split, **more):
        seen.append(split)
        return real(model, task, split, **more)

    monkeypatch.setattr(evaluation, "data_for", watched)
    file = tmp_path / "s.json"
    arguments = ["--backbone", str(tiny_backbone), "--search", "--task", "demo", "--rate", "0.4", "--limit", "20"]
    out = shown(capsys, *arguments, "--trials", "2", "--output", str(file))
    assert set(seen) == {"train", "validation"}
    assert "best of 3 schedules" in out and "the test split was not looked at" in out
    assert (tmp_path / "s.trials.jsonl").is_file()
    first = json.loads(file.read_text())["details"]["trials"]
    shown(capsys, *arguments, "--trials", "3", "--output", str(file), "--overwrite")
    assert json.loads(file.read_text())["details"]["trials"][:3] == first


def test_a_run_is_read_with_its_adapter(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "run", tmp_path / "s.json"
    folder.mkdir()
    options = RunOptions(backbone=str(tiny_backbone), method="pyra", rate=0.3)
    task = task_for(options)
    save_adapter(new_model(options, len(task.labels)), folder / "adapter")
    save_run(folder, options, task)
    arguments = ["--run", str(folder), "--rate", "0.4", "--output", str(file)]
    out = shown(capsys, *arguments, "--search", "--trials", "1", "--limit", "8")
    assert "the run may have been trained on them" in out
    record = json.loads(file.read_text())
    assert record["how"] == "searched" and record["rate"] >= 0.4
    assert record["backbone"] == tiny_backbone.name
    shown(capsys, *arguments, "--calibrate", "demo", "--images", "2", "--overwrite")
    assert json.loads(file.read_text())["how"] == "calibrated"


def test_files_stay_unless_they_may_go(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        make_schedule(ScheduleOptions(rate=0.3, output=str(file)))
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "exactly one of --rate, --latency and --speedup"),
        ({"rate": 0.5, "speedup": 2.0}, "exactly one"),
        ({"rate": 1.5}, "--rate must be in"),
        ({"speedup": 0.5}, "--speedup must be"),
        ({"latency": "5"}, "such as 5ms"),
        ({"latency": "0ms"}, "such as 5ms"),
        ({"rate": 0.5, "calibrate": "demo", "search": True, "task": "demo"}, "not both"),
        ({"rate": 0.5, "search": True}, "--search needs --task"),
        ({"rate": 0.5, "task": "demo"}, "go with --search"),
        ({"rate": 0.5, "run": "a", "image_size": 96}, "leave --image-size out"),
        ({"rate": 0.5, "trials": 0}, "--trials must be"),
        ({"rate": 0.5, "matching": "prune"}, "--method tome"),
        ({"rate": 0.5, "output": "s.txt"}, "must end in .json"),
        ({"rate": 0.5, "device": "tpu"}, "--device"),
    ],
)
def test_wrong_options(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleOptions(**wrong)


def test_a_rate_out_of_reach_names_the_most(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="at most"):
        make_schedule(ScheduleOptions(backbone=str(tiny_backbone), rate=0.95, output=str(tmp_path / "s.json")))


def test_times() -> None:
    assert (parse_seconds("5ms"), parse_seconds("0.2s"), parse_seconds("800us")) == pytest.approx((5e-3, 0.2, 8e-4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "cannot be read"),
        ("[1, 2]", "holds no schedule"),
        ('{"schedule": [1.5]}', "holds no schedule"),
        ('{"schedule": [true]}', "holds no schedule"),
        ('{"schedule": [1], "format": 99}', "newer"),
    ],
)
def test_files_that_hold_no_schedule(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as wrong:
        RunOptions(method="tome", schedule=str(file))
    assert "\n" not in str(wrong.value)


def test_schedules_in_words() -> None:
    assert parse_schedule(" 16,-1 ") == [16, -1]
    with pytest.raises(ConfigError, match="'half' is not a whole number"):
        parse_schedule("16,half")
    with pytest.raises(ConfigError, match="No such file"):
        read_schedule("nowhere.json")
    with pytest.raises(ConfigError, match="at least 0"):
        RunOptions(method="tome", schedule="16,-1")
