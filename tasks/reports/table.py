"""The table of results: one row a run, numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tabulate import tabulate

from pyra.tasks.results import PROTOCOLS, RunResult

_PERCENT = {
    "accuracy": "top-1 (%)",
    "top1": "top-1 (%)",
    "top-1": "top-1 (%)",
    "top5": "top-5 (%)",
    "preference_accuracy": "preferred (%)",
}
ANSWER_NLL = "answer NLL"
"""Header of the mean negative log-likelihood of the right answers, in nats a token."""

ANSWER_TOKENS = "tokens an answer"
"""Header of the mean number of generated tokens, thoughts included."""

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
    align = ["left" if name in ("task", "method", "protocol") else "right" for name in columns] if cells else None
    return str(tabulate(cells, list(columns), tablefmt=_STYLES[style], disable_numparse=True, colalign=align))


def table_columns(rows: Sequence[RunResult], baseline: RunResult | None = None) -> dict[str, list[str]]:
    """Return the texts of each column under its header; task and seed appear only where they differ.

    Where a row was chosen on the test split, all rows say by which protocol they were made.
    """
    columns: dict[str, list[str]] = {}
    if len({row.task for row in rows}) > 1:
        columns["task"] = [row.task for row in rows]
    columns["method"] = [row.method for row in rows]
    if len({row.seed for row in rows}) > 1:
        columns["seed"] = [str(row.seed) for row in rows]
    if any(row.protocol == "published" for row in rows):
        columns["protocol"] = [protocol_label(row.protocol) for row in rows]
    columns["rate"] = [f"{row.rate:.2f}" for row in rows]
    header = value_name(rows)
    columns[header] = [("" if header != "value" else f"{_name(row)} ") + _value(row) for row in rows]
    if any(row.answer_nll is not None and row.metric != "answer_nll" for row in rows):
        columns[ANSWER_NLL] = [_number(row.answer_nll) for row in rows]
    if any(row.answer_tokens is not None for row in rows):
        columns[ANSWER_TOKENS] = [_number(row.answer_tokens) for row in rows]
    if baseline is not None:
        columns["difference"] = [_value(row, minus=shown_value(baseline)) for row in rows]
    columns["trained parameters"] = [f"{row.trained_parameters:,}" for row in rows]
    unit, size = macs_unit(rows)
    columns[f"MACs ({unit})"] = [_number(row.macs / size) for row in rows]
    units = {row.unit for row in rows}
    if "images" not in units and all(row.images_per_second is None for row in rows):
        return columns  # what is never timed, such as post-training, has no column for it
    speeds = [_number(row.images_per_second) for row in rows]
    columns[f"{units.pop()}/s" if len(units) == 1 else "speed"] = speeds
    speedups = [_speedup(row, baseline) for row in rows]
    columns["speed-up"] = ["-" if speedup is None else f"{speedup:.2f}x" for speedup in speedups]
    return columns


def protocol_label(protocol: str | None) -> str:
    """Return what a table says of a protocol; that numbers were chosen on the test split stands wherever they do."""
    if protocol == "published":
        return f"published ({PROTOCOLS['published']})"
    return protocol or "-"


def value_name(rows: Sequence[RunResult]) -> str:
    """Return the name of the metric all rows share, or "value"."""
    names = {_name(row) for row in rows}
    return names.pop() if len(names) == 1 else "value"


def shown_value(row: RunResult) -> float:
    """Return the value as people read it: an accuracy in percent."""
    return 100 * row.value if row.metric in _PERCENT else row.value


def metric_name(metric: str) -> str:
    """Return what tables call a metric, with its unit."""
    return _PERCENT.get(metric, metric)


def value_text(metric: str, value: float, deviation: float | None = None, *, sign: bool = False) -> str:
    """Return a value as people read it, with its standard deviation where there is one.

    >>> value_text("accuracy", 0.6044, 0.0051), value_text("rmse", 0.25, sign=True), value_text("rmse", 1e30)
    ('60.4 ± 0.5', '+0.250', '1.000e+30')
    """
    scale, digits = (100, 1) if metric in _PERCENT else (1, 3)

    def text(number: float, plus: str = "") -> str:
        return f"{number:{plus}.{digits}f}" if abs(number) < 1e6 else f"{number:{plus}.3e}"

    shown = text(value * scale, "+" if sign else "")
    return shown if deviation is None else f"{shown} ± {text(deviation * scale)}"


def number_text(value: float | None) -> str:
    """Return a positive number with the digits that matter, or "-" for None."""
    return _number(value)


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
    if value >= 1e15:
        return f"{value:.3e}"
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
