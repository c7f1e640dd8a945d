"""Result schema, its file, and provenance."""

from __future__ import annotations

import dataclasses
import datetime
import json

import pytest
import torch

from pyra.errors import ConfigError, DataError
from pyra.files import write_json
from pyra.tasks import results
from pyra.tasks.results import RunResult, environment, read_result

FIXED = {
    "task", "method", "metric", "value", "macs", "schedule", "rate", "trained_parameters", "images_per_second",
    "speedup", "seed",
}  # fmt: skip


def make(**changes):
    row = RunResult(
        task="demo", method="pyra", metric="accuracy", value=0.604, macs=5_080_000_000, schedule=[12, 0], rate=0.71,
        trained_parameters=302_602, seed=3, images_per_second=61.5, speedup=3.02, plain_macs=17_580_000_000,
        environment={"python": "3.12"},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def test_fixed_names_and_round_trip_through_a_file(tmp_path):
    row = make(images_per_second=None, speedup=None)
    assert set(row.to_dict()) >= FIXED
    assert row.to_dict()["schema_version"] == 2
    write_json(tmp_path / "result.json", row)
    assert read_result(tmp_path) == row
    assert read_result(tmp_path) != make()


def test_to_dict_shares_nothing_with_the_row():
    row = make()
    row.to_dict()["schedule"].append(9)
    assert row.schedule == [12, 0]


def test_from_dict_lists_every_problem():
    data = make().to_dict() | {"schema_version": 3, "sped_up": 1, "seed": True, "schedule": [1, "a"], "epochs": "3"}
    del data["task"]
    with pytest.raises(ConfigError) as caught:
        RunResult.from_dict(data)
    for part in ("version 3", "upgrade", "'sped_up' (did you mean 'speedup'", "'task' is missing", "seed = True",
                 "schedule = [1, 'a']", "epochs = '3'"):  # fmt: skip
        assert part in str(caught.value)
    assert RunResult.from_dict(make().to_dict() | {"value": 1}).value == 1


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [(None, DataError, "finished run"), ("{", DataError, "not JSON"), ("[]", ConfigError, "JSON object"),
     ('{"task": "demo"}', ConfigError, "'method' is missing")],
)  # fmt: skip
def test_read_result_names_the_file(tmp_path, content, error, part):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(error, match=part) as caught:
        read_result(tmp_path)
    assert str(tmp_path / "result.json") in str(caught.value)


VERSION_1 = {
    "task": "demo", "method": "pyra", "metric": "accuracy", "value": 0.604, "macs": 103, "schedule": [12, 0],
    "rate": 0.71, "trained_parameters": 302602, "seed": 3, "images_per_second": 61.5, "speedup": 3.02,
    "backbone": "demo", "image_size": 112, "batch_size": 16, "throughput_batch_size": 16, "epochs": 3.0,
    "train_seconds": 40.0, "num_test": 372, "skipped_images": 0, "protocol": "last epoch, test split scored once",
    "plain_macs": 356, "environment": {"python": "3.12"}, "schema_version": 1,
}  # fmt: skip


def test_a_file_of_version_1_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(VERSION_1))
    row = read_result(tmp_path)
    kept = {name: value for name, value in VERSION_1.items() if name != "schema_version"}
    assert {name: row.to_dict()[name] for name in kept} == kept
    assert (row.schema_version, row.split, row.higher_is_better, row.unit) == (2, "test", True, "images")
    for name in ("task_version", "test_sha256", "settings", "adapter", "chosen", "energy_joules", "majority_value"):
        assert getattr(row, name) is None
    write_json(tmp_path / "result.json", row)
    assert read_result(tmp_path) == row


def test_an_evaluation_of_version_1_named_its_split_as_protocol():
    for text, split in (("validation split", "validation"), ("test split", "test"), (None, "test")):
        row = RunResult.from_dict(VERSION_1 | {"protocol": text})
        assert (row.split, row.protocol) == (split, text)
    with pytest.raises(ConfigError, match="protocol = 3"):
        RunResult.from_dict(VERSION_1 | {"protocol": 3})


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1" + "0" * 400, "NaN"])
def test_numbers_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(json.dumps(VERSION_1).replace("0.604", text))
    with pytest.raises((ConfigError, DataError), match=r"too large|no JSON number"):
        read_result(tmp_path)


def test_numbers_within_settings_are_checked_too(tmp_path):
    for settings in ({"lr": [1, {"a": float("inf")}]}, {"lr": 10**400}):
        with pytest.raises(ConfigError, match="settings holds too large a number"):
            RunResult.from_dict(make().to_dict() | {"settings": settings})
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="nested too deeply"):
        RunResult.from_dict(make().to_dict() | {"settings": deep})


def test_environment_is_json_and_says_where():
    here = environment()
    assert {"python", "torch", "timm", "transformers", "peft", "pyra", "device", "threads", "git_commit",
            "accelerate", "datasets", "evaluate", "torchvision", "safetensors"} <= set(here)  # fmt: skip
    assert here["torch"] == torch.__version__ or here["torch"] in torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["device"]
    assert datetime.datetime.fromisoformat(here["date"]).utcoffset() == datetime.timedelta(0)
    json.dumps(here)
    assert environment("cpu").keys() == here.keys()


def test_commit_only_from_a_pyra_checkout(tmp_path, monkeypatch):
    code = tmp_path / "tasks" / "results.py"
    monkeypatch.setattr(results, "__file__", str(code))
    (tmp_path / ".git").mkdir()
    assert results._commit() == (None, None)
    (tmp_path / "pyproject.toml").write_text('name = "pyra-adapt"')

    def git(command, **_):
        assert command[:3] == ["git", "-C", str(tmp_path)]
        return type("Run", (), {"stdout": "abc123\n" if "rev-parse" in command else " M a\n"})

    monkeypatch.setattr(results.subprocess, "run", git)
    assert results._commit() == ("abc123", True)
