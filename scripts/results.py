"""``pyra results``: one table of all runs below folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from pyra.errors import ConfigError, OutputError
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
    page: bool = option(False, "write report.html, front.png and report.md into the one FOLDER instead")
    pictures: bool = option(False, "with --page: draw what merged at a few rates, too, which loads models")


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
            "  pyra results runs/ --compare lora\n  pyra results runs/ --page"
        ),
        positional="folders",
    )
    if options.output is not None and Path(options.output).expanduser().is_dir():
        raise OutputError(f"{options.output} is a folder: --output names a file")
    if options.page:
        return _page(options)
    if options.pictures:
        raise ConfigError("--pictures goes with --page")
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


def _page(options: ResultsOptions) -> int:
    """Write the page of one folder."""
    defaults = ResultsOptions()
    known = ("folders", "page", "pictures")
    given = [
        f.name for f in fields(options) if f.name not in known and getattr(options, f.name) != getattr(defaults, f.name)
    ]
    if given:
        raise ConfigError(f"--{given[0]} does not go with --page, which shows all runs of a folder")
    if len(options.folders) != 1:
        raise ConfigError(f"--page takes one folder, got {len(options.folders)}: {', '.join(options.folders)}")
    from pyra.tasks.sweeps.report import write_report

    print(f"written to {write_report(options.folders[0], pictures=options.pictures)}")
    return 0
