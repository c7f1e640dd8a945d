"""``pyra demo``: four adaptations of a small backbone, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class DemoOptions:
    """Options of ``pyra demo``."""

    output: str = option("demo", "folder to write")
    overwrite: bool = option(False, "replace an earlier demonstration in --output")
    epochs: float | None = option(None, "epochs of each run instead of the demonstration's own")
    limit: int | None = option(None, "use this many images of each split only, to see it run")
    seed: int = option(0, "random seed")
    device: str = option("auto", "auto, cpu or cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print the table and what was written."""
    options = parse(
        DemoOptions,
        argv,
        prog="pyra demo",
        description="Adapt a small vision transformer to ten kinds of clothing in four ways, and compare them.",
        example="pyra demo --output demo",
    )
    from pyra.tasks.demonstration import DemoSettings, demonstrate
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table
    from pyra.tasks.reports.exports import exports_table

    quiet_libraries()
    settings = DemoSettings(seed=options.seed, device=options.device, limit=options.limit)
    if options.epochs is not None:
        settings.epochs = options.epochs
    outcome = demonstrate(options.output, settings, options.overwrite)
    print(f"\n{results_table(outcome.rows)}\n\n{exports_table([outcome.exported])}\n")
    print(f"{options.output}/: demo.md, pareto.html, merged_tokens.png and more, in {outcome.seconds:.0f} s")
    return 0
