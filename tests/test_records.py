"""Wrong records are named problem by problem, before anything is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from pyra.records import ABOVE_0, bound_problems, choice_problems, option, record_problems


@dataclass
class Record:
    """One field of every type that records use."""

    count: int
    share: float = 0.5
    name: str | None = None
    sizes: list[int] = field(default_factory=list)
    order: Literal["up", "down"] = "up"
    extra: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    on: bool = False


def test_a_good_record_has_no_problems() -> None:
    values = {"count": 1, "share": 2, "name": None, "sizes": [1], "order": "down", "extra": {}, "files": {}, "on": True}
    assert record_problems(Record, values) == []
    assert record_problems(Record, {"count": 1}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("count", None),
        ("share", "0.5"),
        ("name", 3),
        ("sizes", [1, "2"]),
        ("sizes", 3),
        ("order", "left"),
        ("extra", []),
        ("files", "a"),
        ("on", 1),
    ],
)
def test_a_wrong_type_is_named(name: str, value: object) -> None:
    (problem,) = record_problems(Record, {"count": 1, name: value})
    assert problem.startswith(f"{name} = {value!r} should be of type ")


def test_all_problems_come_together() -> None:
    problems = record_problems(Record, {"cuont": 1, "share": "x"})
    assert problems == [
        "unknown key 'cuont' (did you mean 'count'?)",
        "key 'count' is missing",
        "share = 'x' should be of type float",
    ]
    assert record_problems(Record, [1]) == ["expected keys and values, found list"]


def test_choices_and_bounds_of_options() -> None:
    @dataclasses.dataclass
    class Options:
        way: str = option("up", "", choices=("up", "down"))
        all_ways: tuple[str, ...] = option((), "", choices=("up", "down"))
        step_size: float | None = None

    assert choice_problems(Options()) == bound_problems(Options(), ABOVE_0, ("step_size",)) == []
    wrong = Options("dwn", ("up", "left"), 0)
    assert choice_problems(wrong) == [
        "--way must be one of up, down, got 'dwn' (did you mean 'down'?)",
        "--all-ways must be one of up, down, got 'left'",
    ]
    assert choice_problems(wrong, leave_out=("way", "all_ways")) == []
    assert bound_problems(wrong, ABOVE_0, ("step_size",)) == ["--step-size must be above 0 and below 1e9, got 0"]
