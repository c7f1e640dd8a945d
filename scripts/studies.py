"""What studies of several ways share: ways told in one option, and a record that goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pyra.errors import ConfigError
from pyra.files import read_json


def several_ways(flag: str, text: str, example: str) -> dict[str, dict[str, Any]]:
    """Return what each way is, by its own words.

    Args:
        flag: that was given, for messages.
        text: options as YAML without braces, several with ``;`` between them.
        example: of one of them, for messages.

    Raises:
        ConfigError: for what is no YAML, or nothing at all.

    >>> several_ways("--ways", "rate: 0.5; rate: 0.5, rule: drop", "rate: 0.5")
    {'rate: 0.5': {'rate': 0.5}, 'rate: 0.5, rule: drop': {'rate': 0.5, 'rule': 'drop'}}
    """
    found = {}
    for words in filter(None, map(str.strip, text.split(";"))):
        try:
            values = yaml.safe_load(f"{{{words}}}")
        except yaml.YAMLError:
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{flag}: {words!r} is no YAML such as {example!r}")
        found[words] = values
    if not found:
        raise ConfigError(f"{flag} is empty")
    return found


def told(options: Any, left_out: Collection[str]) -> dict[str, Any]:
    """Return the options of a study as its record holds them: those that name places or change no row are left out."""
    values = {name: value for name, value in asdict(options).items() if name not in left_out}
    return values | ({"backbone": Path(values["backbone"]).name} if "backbone" in values else {})


def begun_record(output: str, options: Mapping[str, Any], **empty: Any) -> dict[str, Any]:
    """Return the record that a file holds already, if it is of the same options, or a new one.

    Args:
        output: the file.
        options: what :func:`told` returns.
        empty: what a new record holds besides them and ``rows``.

    Raises:
        ConfigError: where the file holds something else.
    """
    if not Path(output).exists():
        return {"options": dict(options), "rows": [], **empty}
    try:
        found = read_json(output)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("options") != options or not isinstance(found.get("rows"), list):
        raise ConfigError(f"--output {output} holds something else: give another file")
    return found
