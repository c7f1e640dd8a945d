"""The tables of exports: how near each is, how fast, how good; of language models also what engines do otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from pyra.tasks.exporting import ExportedRun
    from pyra.tasks.exporting_language import ExportedLanguage

_HEADERS = ("export", "MB", "s", "runtime", "largest difference", "other merges", "same top-1", "images/s", "metric")
_OF_LANGUAGE = ("export", "MB", "s", "weights", "known to", "reloaded with", "largest difference", "same top-1")
_RIGHT = ("left", "right", "right", "left", "right", "right", "right", "right", "right")


def exports_table(exports: Sequence[ExportedRun], style: str = "simple") -> str:
    """Return a row a runtime of each export; the last column says what rounding does to the metric of the task."""
    rows = []
    for export in exports:
        speeds, measured = dict(export.measured.images_per_second), export.measured
        for number, comparison in enumerate(export.report.comparisons):
            named = number == 0
            rows.append(
                (
                    str(export.folder) if named else "",
                    f"{export.report.megabytes:.1f}" if named else "",
                    f"{export.report.seconds:.0f}" if named else "",
                    comparison.runtime,
                    f"{comparison.relative_difference:.1e}",
                    f"{comparison.differing} of {comparison.compared}",
                    f"{comparison.top1_agreement:.1%}",
                    f"{speeds[comparison.runtime]:.0f}",
                    _metric(measured.value, measured.plain_value) if named else "",
                )
            )
    return tabulate(rows, headers=_HEADERS, tablefmt=style, colalign=_RIGHT, disable_numparse=True)


def _metric(value: float | None, plain: float | None) -> str:
    if value is None or plain is None:
        return "as the model"
    return f"{value:.1%} (model {plain:.1%})"


def language_table(exports: Sequence[ExportedLanguage], style: str = "simple") -> str:
    """Return a row an export of a language model; differences are a share of the largest logit."""
    rows = []
    for export in exports:
        record, found = export.record, export.record.reloaded
        rows.append(
            (
                str(export.folder),
                f"{record.megabytes:.1f}",
                f"{record.seconds:.0f}",
                record.weights,
                ", ".join(row["engine"] for row in record.engines),
                "not reloaded" if found is None else found["with"],
                "-" if found is None else f"{found['relative_difference']:.1e}",
                "-" if found is None else f"{found['top1_agreement']:.1%}",
            )
        )
    align = ("left", "right", "right", "left", "left", "left", "right", "right")
    return tabulate(rows, headers=_OF_LANGUAGE, tablefmt=style, colalign=align, disable_numparse=True)


def language_remarks(exports: Sequence[ExportedLanguage]) -> list[str]:
    """Return what a user should know of exports of one language model, a line each."""
    remarks = []
    merging = exports[0].record.merging
    if merging is not None:
        remarks.append(f"prompts: {merging['text']}")
        remarks.append(
            f"  so {merging['rate']:.0%} of a prompt's multiply-accumulates are not saved there, and answers are "
            f"others: {merging['whole']:.4f} nats a token, {merging['merging']:.4f} with merging, as it was trained "
            f"(difference {merging['difference']:+.4f} ± {merging['error']:.4f}, {merging['answers']} answers, the "
            f"same likeliest token {merging['top1_agreement']:.1%})"
        )
    for export in exports:
        record = export.record
        notes = [record.mtp["note"]] if "note" in record.mtp else []
        if moved := (record.reloaded or {}).get("rounding"):
            notes.append(
                "compared with the model's own weights, rounded; rounding them moves logits by up to "
                f"{moved['relative_difference']:.1e} of the largest one, and leaves {moved['top1_agreement']:.1%} of "
                "the likeliest tokens as they were"
            )
        remarks += [f"{export.folder}: {note}" for note in (*notes, *record.notes)]
    record = exports[0].record
    where = exports[0].folder
    serve = f"llama-server -m {where}/model.gguf" if record.format.startswith("gguf") else f"vllm serve {where}"
    return [*remarks, f"next: {serve}"]
