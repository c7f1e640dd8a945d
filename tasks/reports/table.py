"""The table of results: one row a run, numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tabulate import tabulate

from pyra.tasks.results import RunResult

_PERCENT = {"accuracy": "top-1 (%)", "top1": "top-1 (%)", "top-1": "top-1 (%)", "top5": "top-5 (%)"}
_STYLES = {"plain": "simple", "markdown": "pipe", "html": "html"}


def results_table(
    rows: Sequence[RunResult],
    style: Literal["plain", "markdown", "html"] = "plain",
    baseline: RunResult | str | None = None,
) -> str:
    """Return the rows as a table with one header line.

    ``baseline`` (a row, or the method name of one) adds the difference in points to it and makes it the 1.00x of the
    speed-up column; without it the speed-up is the one each run measured. What was not measured shows as "-".

    Raises:
        ValueError: an unknown style, or no row of the baseline's name.
    """
    if style not in _STYLES:
        raise ValueError(f"style is one of {sorted(_STYLES)}, not {style!r}")
    if isinstance(baseline, str):
        baseline = _named(rows, baseline)
    columns = table_columns(rows, baseline)
    cells = [list(line) for line in zip(*columns.values(), strict=True)]
    if style == "markdown":
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    align = ["left" if name in ("task", "method") else "right" for name in columns] if cells else None
    return str(tabulate(cells, list(columns), tablefmt=_STYLES[style], disable_numparse=True, colalign=align))


def table_columns(rows: Sequence[RunResult], baseline: RunResult | None = None) -> dict[str, list[str]]:
    """Return the texts of each column under its header; task and seed appear only where they differ."""
    columns: dict[str, list[str]] = {}
    if len({row.task for row in rows}) > 1:
        columns["task"] = [row.task for row in rows]
    columns["method"] = [row.method for row in rows]
    if len({row.seed for row in rows}) > 1:
        columns["seed"] = [str(row.seed) for row in rows]
    columns["rate"] = [f"{row.rate:.2f}" for row in rows]
    header = value_name(rows)
    columns[header] = [("" if header != "value" else f"{_name(row)} ") + _value(row) for row in rows]
    if baseline is not None:
        columns["difference"] = [_value(row, minus=shown_value(baseline)) for row in rows]
    columns["trained parameters"] = [f"{row.trained_parameters:,}" for row in rows]
    unit, size = macs_unit(rows)
    columns[f"MACs ({unit})"] = [_number(row.macs / size) for row in rows]
    columns["images/s"] = [_number(row.images_per_second) for row in rows]
    speedups = [_speedup(row, baseline) for row in rows]
    columns["speed-up"] = ["-" if speedup is None else f"{speedup:.2f}x" for speedup in speedups]
    return columns


def value_name(rows: Sequence[RunResult]) -> str:
    """Return the name of the metric all rows share, or "value"."""
    names = {_name(row) for row in rows}
    return names.pop() if len(names) == 1 else "value"


def shown_value(row: RunResult) -> float:
    """Return the value as people read it: an accuracy in percent."""
    return 100 * row.value if row.metric in _PERCENT else row.value


def macs_unit(rows: Sequence[RunResult]) -> tuple[str, float]:
    """Return the unit that suits the MACs of all rows, and its size."""
    return ("G", 1e9) if max((row.macs for row in rows), default=0) >= 1e9 else ("M", 1e6)


def _name(row: RunResult) -> str:
    return _PERCENT.get(row.metric, row.metric)


def _value(row: RunResult, minus: float | None = None) -> str:
    digits = 1 if row.metric in _PERCENT else 3
    return f"{shown_value(row):.{digits}f}" if minus is None else f"{shown_value(row) - minus:+.{digits}f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _speedup(row: RunResult, baseline: RunResult | None) -> float | None:
    if baseline is None:
        return row.speedup
    if not row.images_per_second or not baseline.images_per_second:
        return None
    return row.images_per_second / baseline.images_per_second


def _named(rows: Sequence[RunResult], method: str) -> RunResult:
    for row in rows:
        if row.method == method:
            return row
    raise ValueError(f"no row of method {method!r}; there are {sorted({row.method for row in rows})}")
