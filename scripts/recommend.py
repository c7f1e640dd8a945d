"""``pyra recommend``: the fastest point of a folder of runs that loses little."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class RecommendOptions:
    """Options of ``pyra recommend``."""

    folder: str = option("", "folder with runs, at any depth", metavar="FOLDER")
    max_drop: float = option(1.0, "percentage points of accuracy that may be lost", metavar="POINTS")
    by: str = option("speed", "what is to be best: measured speed, or MACs", choices=("speed", "macs"))
    where: list[str] = field(
        default_factory=list,
        metadata={"help": "these runs only: task=demo,method=lora,method=pyra (or rate, backbone, protocol, ...)"},
    )
    json: bool = option(False, "print JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, choose, print; 1 where nothing qualifies."""
    options = parse(
        RecommendOptions,
        argv,
        prog="pyra recommend",
        description=(
            "Name the fastest point of a folder of runs whose accuracy is within a few points of the best\n"
            "uncompressed method, and say how sure that is. The exit status is 1 where nothing qualifies."
        ),
        example="pyra recommend sweep/ --max-drop 1.0\n  pyra recommend runs/ --max-drop 0.5 --by macs --json",
        positional="folder",
    )
    if not options.folder:
        raise ConfigError("FOLDER is missing: give a folder with runs (see 'pyra recommend --help')")
    from pyra.tasks.reports.formats import clean, plain
    from pyra.tasks.reports.table import value_text
    from pyra.tasks.results import rate_text
    from pyra.tasks.sweeps.commands import commands
    from pyra.tasks.sweeps.recommend import recommend_from, recommendation_table, record, verdict

    found = recommend_from(options.folder, options.max_drop, options.by, options.where)
    if options.json:
        print(json.dumps(record(found), indent=2, ensure_ascii=False, allow_nan=False))
        return 0 if found.chosen else 1
    print(plain(recommendation_table(found)))
    print(f"\n{clean(verdict(found))} (by {found.by})")
    for note in found.notes:
        print(f"- {clean(note)}")
    if found.chosen is not None:
        at = found.chosen.point
        own = value_text(at.row.metric, at.row.value)
        print(f"\nto use it (the first of its seeds, which scored {own}):")
        for one in commands(at.row.unit, at.run, at.asked_rate):
            if one.language == "sh":
                print(f"  {one.text}")
        if at.row.unit == "images":
            name = "load_run" if at.asked_rate is None else "run_at_rate"
            asked = "" if at.asked_rate is None else f", {rate_text(at.asked_rate)}"
            print(f"  in Python: from pyra.tasks.runs import {name}; ", end="")
            print(f"model, options, labels = {name}({str(at.run)!r}{asked})")
    return 0 if found.chosen else 1
