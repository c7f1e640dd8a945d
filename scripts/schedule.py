"""``pyra schedule``: find how many tokens to remove in each block, by measurement."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyra.scripts.cli import parse
from pyra.tasks.schedules.making import ScheduleOptions

if TYPE_CHECKING:
    from pyra.tasks.schedules.making import Made


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table and the schedule, and where it was written."""
    options = parse(
        ScheduleOptions,
        argv,
        prog="pyra schedule",
        description=(
            "Find the tokens to remove in each block: for a rate, or for a latency measured on this device; with the\n"
            "shape of the rate solver, distributed by what merging disturbs (--calibrate), or searched (--search).\n"
            "What is printed last, and the JSON file, is what pyra train --schedule takes."
        ),
        example=(
            "pyra schedule --backbone vit_small_patch16_224 --speedup 2\n"
            "  pyra schedule --backbone vit_small_patch16_224 --latency 50ms --batch-size 1 --output fast.json\n"
            "  pyra schedule --backbone vit_small_patch16_224 --calibrate photos/ --rate 0.5\n"
            "  pyra schedule --search --task demo --rate 0.5 --trials 20"
        ),
    )
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.schedules.making import make_schedule

    quiet_libraries()
    made = make_schedule(options)
    print(_table(made))
    for line in _said(made):
        print(line)
    print(f"schedule: {','.join(map(str, made.record.schedule))}")
    print(f"written to {options.output}; next: {_next(options)}")
    return 0


def _next(options: ScheduleOptions) -> str:
    """Return the training that takes the schedule, on the same model at the same size."""
    if options.run is not None:
        return f"pyra train with the options of {options.run} and --schedule {shlex.quote(options.output)}"
    line = ["pyra", "train", "--method", options.method, "--schedule", options.output]
    for name in ("task", "data", "root", "backbone", "checkpoint", "image_size"):
        value = getattr(options, name)
        if value is not None and (name, value) != ("backbone", "demo"):
            line += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line if options.pretrained else [*line, "--no-pretrained"])


def _table(made: Made) -> str:
    from tabulate import tabulate

    unit, factor = ("MACs (M)", 1e-6) if made.timed is None else ("ms", 1e3)
    rows = [
        (int(row["layer"]) + 1, row["tokens"], row["removed"], f"{factor * row['cost']:.4g}")
        + ((f"{row['drift']:.4f}",) if "drift" in row else ())
        for row in made.record.layers
    ]
    headers = ("layer", "tokens in", "removed", unit, "drift")[: len(rows[0])]
    return tabulate(rows, headers=headers, disable_numparse=True, stralign="right", numalign="right")


def _said(made: Made) -> list[str]:
    from pyra.tasks.schedules.latency import TOLERANCE

    record, lines = made.record, []
    lines.append(f"saves {record.rate:.3f} of the MACs ({record.macs / 1e6:.5g} M of {record.plain_macs / 1e6:.5g} M)")
    if made.timed is not None:
        batch = made.timed.costs.batch_size
        for number, check in enumerate(made.timed.checks):
            name = "taken" if check is made.timed.chosen else "first" if number == 0 else "also tried"
            predicted = f"predicted {1e3 * check.predicted:.4g} ms ({check.predicted_speedup:.2f} x)"
            measured = f"measured {1e3 * check.measured:.4g} ms ({check.speedup:.2f} x)"
            lines.append(f"{name}: {predicted}, {measured}; plain {1e3 * check.plain:.4g} ms, batch {batch}")
        if made.timed.met:
            lines.append(f"met, within {TOLERANCE:.0%} of measurement: {made.timed.target.said()}")
        else:
            lines.append(f"NOT met: {made.timed.target.said()} was asked for")
    if made.searched is not None:
        best, start = made.searched.best, made.searched.trials[0]
        count = len(made.searched.trials)
        scores = f"{best.score:.2%} (the one it started from: {start.score:.2%})"
        lines.append(f"best of {count} schedules: {scores}")
    return lines + made.notes
