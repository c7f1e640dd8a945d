"""``pyra export``: write a run for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse

_IMAGES = 32
_OF_IMAGES, _OF_LANGUAGE = ("onnx",), ("engine",)


@dataclass(kw_only=True)
class ExportOptions:
    """Options of ``pyra export``."""

    run: str = option("", "folder of a run; of a language model also one that transformers or compress-experts wrote")
    format: list[str] | None = option(  # noqa: RUF009 - a dataclass field
        None, "what to write, a list of the names above; onnx by default, engine for a language model"
    )
    output: str | None = option(
        None,
        "folder to write to, a folder a format (one format of a language model goes into it directly); RUN/export by "
        "default",
    )
    overwrite: bool = option(False, "replace earlier exports in --output")
    rate: list[float] | None = option(  # noqa: RUF009 - a dataclass field
        None, "image models: shares of the MACs to save, an export each; the run's own by default"
    )
    images: int = option(
        _IMAGES, "image models: test images to compare the reloaded model with the run on, and to time"
    )
    tolerance: float | None = option(
        None, "largest allowed difference, as a share of the largest logit; the format's own by default"
    )
    verify: bool = option(True, "language models: open what was written, and compare its logits with the model's")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, compare, print what was found."""
    options = parse(
        ExportOptions,
        argv,
        prog="pyra export",
        description="Fold the adapter, write the model, reload it and compare. Image models keep their merging, are "
        "timed and scored;\nlanguage models go to engines, which compute whole prompts.\n\n"
        f"formats of image models:\n{_formats('pyra.export.formats', 'FORMATS')}\n\n"
        f"formats of language models:\n{_formats('pyra.export.language_formats', 'LANGUAGE_FORMATS')}",
        example="pyra export runs/a --format hf,onnx,onnx-int8 --output exported\n"
        "  pyra export runs/sft --format engine --output engine/\n"
        "  pyra export runs/sft --format gguf-q8_0 --output gguf/",
        positional="run",
    )
    if not options.run:
        raise ConfigError("RUN is missing: give the folder of a run (see 'pyra export --help')")
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    from pyra.tasks.exporting_language import is_language_source

    return _language(options) if is_language_source(options.run) else _images(options)


def _images(options: ExportOptions) -> int:
    from tqdm import tqdm

    from pyra.export.language_formats import LANGUAGE_FORMATS
    from pyra.tasks.exporting import PYTORCH, check_formats, export_subject, subject_of
    from pyra.tasks.reports.exports import exports_table

    formats = list(_OF_IMAGES) if options.format is None else options.format
    wrong = [name for name in formats if name in LANGUAGE_FORMATS]
    if wrong:
        raise ConfigError(f"--format {wrong[0]} is for language models, and {options.run} holds none")
    if not options.verify:
        raise ConfigError("--no-verify is for language models: exports of image models are always compared")
    check_formats(formats, options.rate)
    output = Path(options.output) if options.output else Path(options.run) / "export"
    rates: list[float | None] = [*options.rate] if options.rate else [None]
    exports = []
    with tqdm(total=len(rates) * len(formats), unit="export", leave=False, disable=None) as bar:
        for rate in rates:
            subject = subject_of(options.run, rate=rate, images=options.images)
            for format in formats:
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


def _language(options: ExportOptions) -> int:
    from pyra.tasks.exporting_language import check_language_formats, export_language, language_subject, output_folders
    from pyra.tasks.reports.exports import language_remarks, language_table

    formats = list(_OF_LANGUAGE) if options.format is None else options.format
    check_language_formats(formats)
    if options.rate is not None or options.images != _IMAGES:
        name = "--rate" if options.rate is not None else "--images"
        raise ConfigError(f"{name} is for image models: engines compute whole prompts of a language model")
    folders = output_folders(options.run, formats, options.output, options.overwrite)
    subject = language_subject(options.run)
    exports = [
        export_language(
            subject,
            folder,
            format,
            overwrite=options.overwrite,
            verify=options.verify,
            tolerance=options.tolerance,
        )
        for format, folder in zip(formats, folders, strict=True)
    ]
    print(language_table(exports))
    for remark in language_remarks(exports):
        print(remark)
    return 0


def _formats(module: str, name: str) -> str:
    import importlib

    formats = getattr(importlib.import_module(module), name)
    return "\n".join(f"  {format.name:<19}{format.text}" for format in formats.values())
