"""Records from JSON or YAML: all that is wrong with one, found by the fields of the dataclass it should become."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

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
