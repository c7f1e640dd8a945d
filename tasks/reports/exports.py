"""The table of exports: how near each is, how fast, how good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from pyra.tasks.exporting import ExportedRun

_HEADERS = ("export", "MB", "s", "runtime", "largest difference", "other merges", "same top-1", "images/s", "metric")
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
