"""Runs of a sweep that failed: ``failures/*.json`` below its folder, one a run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyra.files import read_json, write_json
from pyra.tasks.options import RunOptions
from pyra.tasks.results import RESULT_FILE

FAILURES = "failures"
_USUAL = {one.name: one.default for one in fields(RunOptions)} | {"resume": True, "track": [], "task": None}
_LONGEST = 200  # characters of a name
HALVED = "halved"
"""Kind of a failure for memory that is not the end of its run, which goes on with half the batch, whatever comes."""


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error: its name, its options as one line, the error and when it was."""

    run: str
    options: str
    error: str
    when: str


def failure_file(folder: Path, name: str) -> Path:
    """Return the file that says why a run failed."""
    return folder / FAILURES / f"{name}.json"


def note_failure(folder: Path, name: str, kind: str, error: str, options: Mapping[str, Any]) -> None:
    """Write down why a run failed, in one line."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"run": name, "kind": kind, "error": error, "when": when, "options": options}
    write_json(failure_file(folder, name), record)


def forget_failure(folder: Path, name: str) -> None:
    """Remove what was written down of a run that has finished since."""
    failure_file(folder, name).unlink(missing_ok=True)


def kind_of_failure(file: Path) -> str | None:
    """Return how a run failed, or None where none did; of a damaged file nothing is known but that one did."""
    try:
        stored = read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        stored = None
    return str(stored.get("kind")) if isinstance(stored, dict) else "unknown"


def read_failures(folder: Path) -> list[Failure]:
    """Read what failed and has not finished since, in order of name; a damaged file is a failure without details."""
    found = []
    for file in sorted((folder / FAILURES).glob("*.json")):
        try:
            stored = read_json(file)
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            found.append(Failure(file.stem, "", f"{file.name} cannot be read", ""))
            continue
        run = str(stored.get("run", file.stem))
        run = file.stem if "/" in run or len(run) > _LONGEST else run
        if not any((folder / place / RESULT_FILE).is_file() for place in (run, f"runs/{run}")):
            options = stored.get("options")
            named = options.items() if isinstance(options, dict) else ()
            text = ", ".join(f"{name}={value}" for name, value in named if value not in (_USUAL.get(name), None))
            error = " ".join(str(stored.get("error", "")).split())
            found.append(Failure(run, text, error, str(stored.get("when", ""))))
    return found
