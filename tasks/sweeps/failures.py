"""Runs of a sweep that failed: ``failures/*.json`` below its folder, one a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyra.files import read_json
from pyra.tasks.results import RESULT_FILE

FAILURES = "failures"


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error: its name, its options as one line, the error and when it was."""

    run: str
    options: str
    error: str
    when: str


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
        if not any((folder / place / RESULT_FILE).is_file() for place in (run, f"runs/{run}")):
            options = stored.get("options")
            named = options.items() if isinstance(options, dict) else ()
            text = ", ".join(f"{name}={value}" for name, value in named if value is not None)
            error = " ".join(str(stored.get("error", "")).split())
            found.append(Failure(run, text, error, str(stored.get("when", ""))))
    return found
