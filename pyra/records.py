"""Records from JSON or YAML: all that is wrong with one, found by the fields of the dataclass it should become."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pyra.errors import did_you_mean


def option(default: Any, text: str, **metadata: Any) -> Any:
    """Describe a field of a dataclass that becomes a command-line option: its default and its help."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


def record_problems(record: type, values: object) -> list[str]:
    """List what keeps ``record(**values)`` from being a good one: unknown and missing keys, values of a wrong type.

    >>> @dataclasses.dataclass
    ... class Size:
    ...     width: int
    >>> record_problems(Size, {"widht": 3})
    ["unknown key 'widht' (did you mean 'width'?)", "key 'width' is missing"]
    >>> record_problems(Size, {"width": "3"})
    ["width = '3' should be of type int"]
    """
    if not isinstance(values, Mapping):
        return [f"expected keys and values, found {type(values).__name__}"]
    fields = {field.name: field for field in dataclasses.fields(record) if field.init}
    problems = [f"unknown key {key!r}{did_you_mean(str(key), fields)}" for key in values if key not in fields]
    problems += [
        f"key {name!r} is missing"
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return problems + type_problems(record, {name: values[name] for name in fields if name in values})


def type_problems(record: type, values: Mapping[str, Any]) -> list[str]:
    """List the values that do not have the type of their field; an int is a float, a bool is not an int."""
    hints = _hints(record)
    return [
        f"{name} = {value!r} should be of type {_type_name(hints[name])}"
        for name, value in values.items()
        if not _fits(value, hints[name])
    ]


def choice_problems(record: Any, leave_out: Collection[str] = ()) -> list[str]:
    """List the values of a dataclass of :func:`option` fields that are neither their default nor among ``choices``.

    Args:
        record: the dataclass.
        leave_out: names of fields that are not checked.
    """
    problems = []
    for field in dataclasses.fields(record):
        allowed, value = field.metadata.get("choices"), getattr(record, field.name)
        if not allowed or field.name in leave_out:
            continue
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if one not in (*allowed, field.default):
                close = did_you_mean(str(one), allowed)
                problems.append(f"--{_flag(field.name)} must be one of {', '.join(allowed)}, got {one!r}{close}")
    return problems


class Bounds(NamedTuple):
    """What a number must be, in words and as a test."""

    text: str
    hold: Callable[[float], bool]


ABOVE_0 = Bounds("above 0 and below 1e9", lambda value: 0 < value < 1e9)
AT_LEAST_0 = Bounds("at least 0 and below 1e9", lambda value: 0 <= value < 1e9)
BELOW_1 = Bounds("in [0, 1)", lambda value: 0 <= value < 1)
SEED = Bounds("in [0, 2**32)", lambda value: 0 <= value < 2**32)


def bound_problems(record: Any, bounds: Bounds, names: Iterable[str]) -> list[str]:
    """List the fields that are out of bounds; None never is.

    >>> @dataclasses.dataclass
    ... class Step:
    ...     batch_size: int | None
    >>> bound_problems(Step(0), ABOVE_0, ["batch_size"]), bound_problems(Step(None), ABOVE_0, ["batch_size"])
    (['--batch-size must be above 0 and below 1e9, got 0'], [])
    """
    values = {name: getattr(record, name) for name in names}
    return [
        f"--{_flag(name)} must be {bounds.text}, got {value}"
        for name, value in values.items()
        if value is not None and not bounds.hold(value)
    ]


def _flag(name: str) -> str:
    return name.replace("_", "-")


@functools.cache  # tables read thousands of records of one type
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, args[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if hint is int else (int, float))
    return isinstance(value, hint)
