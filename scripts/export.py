"""``pyra export``: write a run for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class ExportOptions:
    """Options of ``pyra export``."""

    run: str = option("", "folder written by pyra train")
    format: list[str] = option(  # noqa: RUF009 - a dataclass field
        ("onnx",), "what to write, a list: hf, torch-export, aoti, onnx, onnx-int8, ..."
    )
    output: str | None = option(None, "folder to write to, a folder a format; RUN/export by default")
    overwrite: bool = option(False, "replace earlier exports in --output")
    rate: list[float] | None = option(  # noqa: RUF009 - a dataclass field
        None, "shares of the MACs to save, an export each; the run's own by default"
    )
    images: int = option(32, "test images to compare the reloaded model with the run on, and to time it with")
    tolerance: float | None = option(
        None, "largest allowed difference, as a share of the largest logit; the format's own by default"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, compare, print what was found."""
    options = parse(
        ExportOptions,
        argv,
        prog="pyra export",
        description="Fold the adapter, export with merging inside the model, reload it, compare, time and score it.\n\n"
        f"formats:\n{_formats()}",
        example="pyra export runs/a --format hf,onnx,onnx-int8 --output exported",
        positional="run",
    )
    if not options.run:
        raise ConfigError("RUN is missing: give the folder of a run (see 'pyra export --help')")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from tqdm import tqdm

    from pyra.tasks.exporting import PYTORCH, check_formats, export_subject, subject_of
    from pyra.tasks.reports.exports import exports_table

    check_formats(options.format, options.rate)
    output = Path(options.output) if options.output else Path(options.run) / "export"
    rates: list[float | None] = [*options.rate] if options.rate else [None]
    exports = []
    with tqdm(total=len(rates) * len(options.format), unit="export", leave=False, disable=None) as bar:
        for rate in rates:
            subject = subject_of(options.run, rate=rate, images=options.images)
            for format in options.format:
                folder = output / (f"{format}-{rate:g}" if len(rates) > 1 else format)
                bar.set_description(folder.name)
                exports.append(
                    export_subject(subject, folder, format, overwrite=options.overwrite, tolerance=options.tolerance)
                )
                bar.update()
    print(exports_table(exports))
    batch = exports[0].measured
    print(
        f"\nimages/s at batch {batch.batch_size}; the model in PyTorch: {batch.images_per_second[PYTORCH]:.0f}"
        f"\nnext: pyra predict {exports[0].folder} IMAGE, pyra serve {exports[0].folder}"
    )
    return 0


def _formats() -> str:
    from pyra.export.formats import FORMATS

    return "\n".join(f"  {name:<19}{format.text}" for name, format in FORMATS.items())
