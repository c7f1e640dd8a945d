"""``pyra export``: write a run for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.errors import ConfigError, did_you_mean
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class ExportOptions:
    """Options of ``pyra export``."""

    run: str = option("", "folder written by pyra train")
    format: str = option("onnx", "what to write")
    output: str | None = option(None, "folder to write to; RUN/export by default")
    overwrite: bool = option(False, "replace an earlier export in --output")
    rate: float | None = option(None, "share of the MACs to save; the run's own by default")
    images: int = option(32, "test images to compare the reloaded file with the model on")
    tolerance: float = option(1e-3, "largest allowed difference, as a share of the largest logit")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, compare, print what was found."""
    options = parse(
        ExportOptions,
        argv,
        prog="pyra export",
        description="Fold the adapter, export with merging inside the graph, reload the file and compare it.",
        example="pyra export runs/a --format onnx",
        positional="run",
    )
    if not options.run:
        raise ConfigError("RUN is missing: give the folder of a run (see 'pyra export --help')")
    from pyra.export import FORMATS

    if options.format not in FORMATS:
        raise ConfigError(
            f"unknown --format {options.format!r}{did_you_mean(options.format, FORMATS)}; there is {', '.join(FORMATS)}"
        )
    from pyra.tasks.exporting import export_run
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    folder = Path(options.output) if options.output else Path(options.run) / "export"
    report, speeds = export_run(
        options.run,
        folder,
        format=options.format,
        overwrite=options.overwrite,
        rate=options.rate,
        images=options.images,
        tolerance=options.tolerance,
    )
    from tabulate import tabulate

    rows = [
        ("file", f"{folder / report.file} ({report.megabytes:.1f} MB)"),
        (
            f"largest difference on {report.compared - report.differing} of {report.compared} images",
            f"{report.max_difference:.2e} (logits to {report.max_logit:.1f})",
        ),
        ("images merged differently (ties within rounding)", report.differing),
        ("same top-1", f"{report.top1_agreement:.1%}"),
        *((f"images/s, {name}", f"{value:.0f}") for name, value in speeds.items()),
    ]
    print(tabulate(rows))
    return 0
