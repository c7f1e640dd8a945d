"""``pyra results``: one table of all runs below folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyra.errors import OutputError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class ResultsOptions:
    """Options of ``pyra results``."""

    folders: list[str] = field(
        default_factory=lambda: ["runs"],
        metadata={"help": "folders with runs, at any depth", "metavar": "FOLDER", "repeated": True},
    )
    pivot: str | None = option(
        None, "rows,columns: two of task, method, rate, backbone, seed, protocol", metavar="ROWS,COLUMNS"
    )
    format: str = option("plain", "how it is written", choices=("plain", "markdown", "csv", "latex", "json"))
    output: str | None = option(None, "write to this file instead of the screen", metavar="FILE")
    compare: str | None = option(
        None, "the paired difference of every other method to this one, with its 95 % interval", metavar="METHOD"
    )
    where: list[str] = field(
        default_factory=list,
        metadata={
            "help": "these runs only: task=demo,method=lora,method=pyra (or rate, backbone, seed, protocol, ...)"
        },
    )
    sort: str = option("name", "order within a task", choices=("name", "value", "rate", "macs", "speed"))
    evaluations: bool = option(False, "read what pyra evaluate wrote into the runs, too")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, collect, print or write."""
    options = parse(
        ResultsOptions,
        argv,
        prog="pyra results",
        description=(
            "Show all runs below folders in one table: runs that differ in their seed only are one row, with mean and "
            "standard deviation."
        ),
        example=(
            "pyra results runs/\n  pyra results runs/ --pivot task,method --format latex --output table.tex\n"
            "  pyra results runs/ --compare lora"
        ),
        positional="folders",
    )
    if options.output is not None and Path(options.output).expanduser().is_dir():
        raise OutputError(f"{options.output} is a folder: --output names a file")
    from pyra.files import write_text
    from pyra.tasks.reports.report import report

    made = report(
        options.folders,
        style=options.format,
        by=options.pivot,
        sort=options.sort,
        where=options.where,
        against=options.compare,
        evaluations=options.evaluations,
    )
    if options.output is None:
        print(made.text, end="")
    else:
        write_text(Path(options.output).expanduser(), made.text)
        print(f"written to {options.output}")
    for note in made.notes:
        print(note, file=sys.stderr)
    return 0
