"""``pyra sweep``: a grid of runs, here or on a cluster, and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyra.scripts.cli import parse

if TYPE_CHECKING:
    from pyra.tasks.sweeps.grid import Planned, SweepOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do what is left of the sweep, report; 1 where runs failed or are left."""
    from pyra.tasks.sweeps.grid import SweepOptions

    options = parse(
        SweepOptions,
        argv,
        prog="pyra sweep",
        description=(
            "Train a grid of methods, rates and seeds on one task, and report accuracy against speed. What is\n"
            "finished is never repeated: after any interruption, or with more rates or seeds, give the line again.\n"
            "A run lies under an address made of its options; one that fails is written down, and the others go on."
        ),
        example=(
            "pyra sweep --task demo --method lora,tome,pyra --rate 0.3,0.5,0.7 --seeds 2 --output sweeps/demo\n"
            "  pyra sweep --task demo --method lora,pyra --rate 0:0.8:0.1 --elastic --output sweeps/elastic\n"
            "  pyra sweep --config sweep.yaml --executor ray --address auto --cpus 4 --gpus 1 --budget 8h"
        ),
    )
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    runs = options.runs()
    return _dry_run(options, runs) if options.dry_run else _sweep(options, runs)


def _dry_run(options: SweepOptions, runs: list[Planned]) -> int:
    from tabulate import tabulate
    from tqdm import tqdm

    from pyra.tasks.sweeps.display import duration
    from pyra.tasks.sweeps.drive import check
    from pyra.tasks.sweeps.estimate import kind_of, probe_apart
    from pyra.tasks.sweeps.folder import is_finished

    check(runs)
    folder = Path(options.output).expanduser()
    done = {planned.name for planned in runs if is_finished(folder, planned)}
    waiting = [planned for planned in runs if planned.name not in done]
    kinds = {kind_of(planned): planned for planned in reversed(waiting)}
    probed = {kind: probe_apart(one) for kind, one in tqdm(kinds.items(), "measuring a few steps", disable=None)}
    found = {planned.name: probed[kind_of(planned)] for planned in waiting}
    rows = [
        [name, "finished", "", ""]
        if name in done
        else [name, "to do", duration(found[name].seconds), _gigabytes(found[name].memory_bytes)]
        for name in (planned.name for planned in runs)
    ]
    print(tabulate(rows, ["run", "state", "time", "memory"]))
    total = sum(found[planned.name].seconds for planned in waiting)
    print(f"{len(waiting)} of {len(runs)} runs are left, {duration(total)} one after another; measured on this machine")
    return 0


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f} GB"


def _sweep(options: SweepOptions, runs: list[Planned]) -> int:
    from pyra.tasks.reports.report import report
    from pyra.tasks.sweeps.display import Display, duration
    from pyra.tasks.sweeps.drive import sweep
    from pyra.tasks.sweeps.failures import read_failures
    from pyra.tasks.sweeps.folder import RUNS
    from pyra.tasks.sweeps.report import write_report

    folder = Path(options.output).expanduser()
    try:
        progress = sweep(options, Display(runs, folder))
    except (KeyboardInterrupt, SystemExit):
        print(f"what is finished in {folder} is kept; the same line goes on", file=sys.stderr)
        raise
    if progress.kept or progress.finished:
        print(report([str(folder / RUNS)], evaluations=options.elastic).text)
        print(f"the front as a page: {write_report(folder)}")
    for failure in read_failures(folder):
        print(f"failed: {failure.run}: {failure.error}", file=sys.stderr)
    if progress.cut:
        took = duration(progress.took)
        print(f"the budget is used up after {took}: {progress.left} runs are left; the same line goes on")
    if (overhead := progress.overhead()) is not None:
        count, took = len(progress.finished), duration(progress.took)
        print(f"{count} run{'s' * (count != 1)} in {took}, {overhead:.1%} of it to start workers and to wait")
    if progress.failed:
        print("what failed is left as it is; the same line with --retry tries it again")
    if progress.kept or progress.finished:
        print(f"saved to {folder}; next: pyra recommend {shlex.quote(str(folder))} --max-drop 1.0")
    return 1 if progress.failed else 3 if progress.left else 0
