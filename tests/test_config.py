"""PyraConfig: all problems at once, and the way to disk and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pyra import PyraConfig
from pyra.errors import ConfigError, ScheduleError

CONFIGS = [
    PyraConfig(schedule=[3, 2, 0]),
    PyraConfig(schedule=[0]),
    PyraConfig(rate=0.7, reactivation=False, proportional_attention=False, order="sequence"),
    PyraConfig(rate=0),
    PyraConfig(rate=0.5, matching="energy", threshold=-0.25),
    PyraConfig(rate=0.5, matching="local", threshold=1, window=3),
    PyraConfig(rate=0.5, matching="prune", reactivation=False),
]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of schedule and rate"),
        ({"schedule": [1], "rate": 0.5}, "exactly one of schedule and rate"),
        ({"schedule": []}, r"schedule must be a list with one whole number a block, got \[\]"),
        ({"schedule": 3}, "schedule must be a list .* got 3"),
        ({"schedule": "12"}, "schedule must be a list .* got '12'"),
        ({"schedule": [1, -2]}, "schedule entry 1 must be a whole number of at least 0, got -2"),
        ({"schedule": [1.0]}, r"schedule entry 0 must be a whole number .* got 1\.0"),
        ({"schedule": [True]}, "schedule entry 0 .* got True"),
        ({"rate": 1}, r"rate must be a number in \[0, 1\), got 1"),
        ({"rate": -0.1}, r"rate must .* got -0\.1"),
        ({"rate": float("nan")}, "rate must .* got nan"),
        ({"rate": "0.5"}, r"rate must .* got '0\.5'"),
        ({"rate": False}, "rate must .* got False"),
        ({"rate": 0.5, "reactivation": 1}, "reactivation must be true or false, got 1"),
        ({"rate": 0.5, "proportional_attention": "yes"}, "proportional_attention must be true or false, got 'yes'"),
        (
            {"rate": 0.5, "matching": "bipartit"},
            r"matching must be one of bipartite, energy, local, prune, got 'bipartit' \(did you mean 'bipartite'",
        ),
        ({"rate": 0.5, "threshold": 1.01}, r"threshold must be a number in \[-1, 1\], got 1\.01"),
        ({"rate": 0.5, "threshold": float("nan")}, "threshold must .* got nan"),
        ({"rate": 0.5, "threshold": True}, "threshold must .* got True"),
        ({"rate": 0.5, "threshold": "0.5"}, "threshold must .* got '0.5'"),
        ({"rate": 0.5, "window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"rate": 0.5, "window": 1.0}, r"window must .* got 1\.0"),
        ({"rate": 0.5, "window": True}, "window must .* got True"),
        ({"rate": 0.5, "matching": "prune"}, "nothing that could be re-activated: give reactivation=False"),
        ({"rate": 0.5, "matching": "prune", "reactivation": False, "threshold": 0.5}, "pruning .* give no threshold"),
        ({"rate": 0.5, "order": "groupd"}, r"order must be one of grouped, sequence, got 'groupd' \(did you"),
    ],
)
def test_problems(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PyraConfig(**values)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PyraConfig(schedule=[-1, 2, -3], rate=2, reactivation=None, matching="x", order="y", threshold=2, window=0)
    text = str(caught.value)
    names = ("rate", "reactivation", "matching", "order", "threshold", "window")
    for part in ("exactly one", "entry 0", "entry 2", *(f"{name} must" for name in names)):
        assert part in text
    assert "entry 1" not in text and "proportional_attention" not in text


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trip(config: PyraConfig, tmp_path: Path) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == 1
    assert PyraConfig.from_dict(values) == config
    config.save(tmp_path / "new" / "pyra_config.json")
    assert PyraConfig.load(tmp_path / "new" / "pyra_config.json") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pyra_config.json"]


def test_values_are_not_shared() -> None:
    schedule = [1, 2]
    config = PyraConfig(schedule=schedule)
    schedule[0] = 9
    values = config.to_dict()
    values["schedule"][1] = 9
    assert config.schedule == [1, 2]
    PyraConfig.from_dict(values)
    assert values["version"] == 1  # the argument was not changed


def test_files_from_before_threshold_and_window() -> None:
    old = {"version": 1, "schedule": [1], "rate": None, "reactivation": True, "proportional_attention": True}
    config = PyraConfig.from_dict({**old, "matching": "bipartite", "order": "grouped"})
    assert config == PyraConfig(schedule=[1]) and (config.threshold, config.window) == (None, 1)


def test_a_tuple_is_a_schedule() -> None:
    assert PyraConfig(schedule=(1, 2)) == PyraConfig(schedule=[1, 2])


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PyraConfig(rate=0.5).rate = 0.6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.5, "reactivaton": True}, r"unknown key 'reactivaton' \(did you mean 'reactivation'\?\)"),
        ({"rate": 0.5, "zzz": 1}, "unknown key 'zzz'$"),
        ({"rate": 0.5, "version": 2}, r"format version 2 is newer than this library's \(1\): upgrade"),
        ({"rate": 0.5, "version": "one"}, "format version 'one'"),
        ({"version": 9, "ordre": 1}, r"unknown key 'ordre' \(did you mean 'order'\?\); format version 9"),
        ({"version": 1}, "exactly one of schedule and rate"),
    ],
)
def test_from_dict_problems(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PyraConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not a readable JSON file"),
        ("[1]", "expected a JSON object, found list"),
        ('{"rate": 7}', "rate must be"),
        ('{"rate": 0.5, "oder": "grouped"}', "did you mean 'order'"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
    ],
)
def test_load_names_the_file(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pyra_config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"pyra_config\.json: .*{message}"):
        PyraConfig.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pyra_config.json"
    CONFIGS[0].save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        CONFIGS[1].save(path)
    assert PyraConfig.load(path) == CONFIGS[0] and list(tmp_path.iterdir()) == [path]


def test_paper() -> None:
    config = PyraConfig.paper("vit_base_patch16_224.augreg_in21k", "high")
    assert config == PyraConfig(schedule=[40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3])
    assert config.reactivation and config.proportional_attention and config.order == "grouped"
    with pytest.raises(ScheduleError, match="no published schedule for 'resnet50'"):
        PyraConfig.paper("resnet50", "low")


def test_a_window_without_local_matching_is_refused() -> None:
    with pytest.raises(ConfigError, match="window is read by matching='local' only; this is 'bipartite'"):
        PyraConfig(rate=0.5, window=2)
    assert PyraConfig(rate=0.5, window=2, matching="local").window == 2
