"""Ways and records of studies: read as told, gone on with, refused where they are of something else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.scripts.studies import begun_record, several_ways, told


@dataclass
class _Options:
    backbone: str = "models/tiny"
    rate: float = 0.5
    output: str = "rows.json"


def test_ways_are_read_by_their_own_words() -> None:
    assert several_ways("--ways", " a: 1, b: [2] ;; c: x;", "a: 1") == {
        "a: 1, b: [2]": {"a": 1, "b": [2]},
        "c: x": {"c": "x"},
    }


@pytest.mark.parametrize("text", ["a: [", "a: 1; b: }{", "}"])
def test_words_that_are_no_yaml_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--ways: .* is no YAML such as 'a: 1'") as found:
        several_ways("--ways", text, "a: 1")
    assert "\n" not in str(found.value)


def test_no_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ways is empty"):
        several_ways("--ways", " ; ", "a: 1")


def test_a_record_is_gone_on_with(tmp_path: Path) -> None:
    options = told(_Options(), ("output",))
    assert options == {"backbone": "tiny", "rate": 0.5}
    file = tmp_path / "rows.json"
    begun = begun_record(str(file), options, prefill={})
    assert begun == {"options": options, "rows": [], "prefill": {}}
    begun["rows"].append({"name": "a"})
    file.write_text(json.dumps(begun))
    assert begun_record(str(file), options, prefill={}) == begun


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"options": {"rate": 1.0}, "rows": []}', '{"options": {}}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds something else: give another file"):
        begun_record(str(file), {"rate": 0.5})
    assert file.read_text() == content
