"""``pyra evaluate``: score and time a saved run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class EvaluateOptions:
    """Options of ``pyra evaluate``."""

    run: str = option("", "folder written by pyra train")
    split: str = option("test", "split to score")
    rate: float | None = option(
        None, "share of the MACs to save; the run's own by default, any of its range if elastic"
    )
    batch_size: int | None = option(None, "images a forward; the run's own by default")
    device: str = option("auto", "auto, cpu or cuda")
    skip_broken: bool = option(False, "leave unreadable images out instead of stopping")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print a table and write the result into the run."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="pyra evaluate",
        description="Score a saved run as it is deployed (adapter folded, tokens merged) and time it.",
        example="pyra evaluate runs/a\n  pyra evaluate runs/elastic --rate 0.5",
        positional="run",
    )
    if not options.run:
        raise ConfigError("RUN is missing: give the folder of a run (see 'pyra evaluate --help')")
    from pyra.tasks.evaluation import evaluate_run, evaluation_file
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.reports import results_table

    quiet_libraries()
    result = evaluate_run(
        options.run,
        split=options.split,
        batch_size=options.batch_size,
        device=options.device,
        skip_broken=options.skip_broken,
        rate=options.rate,
    )
    print(results_table([result]))
    if result.skipped_images:
        print(f"{result.skipped_images} unreadable images were left out")
    print(f"written to {Path(options.run) / evaluation_file(options.split, options.rate)}")
    return 0
