"""One row format for everything that is timed, readable on its own: what, on what, with which code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pyra.files import write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity.

    Attributes:
        measured: what was measured, such as ``"merge"`` or ``"forward, high"``.
        implementation: what ran, such as ``"triton"`` or ``"merged"``.
        backbone: timm name whose shapes were taken, or the sizes of a language model.
        image_size: image side in pixels; 0 for a language model.
        batch_size: images, prompts of a decoder, or tokens of an expert layer.
        dtype: of the tensors.
        unit: of the three quantiles: ``"us"``, ``"ms"``, ``"images/s"``, ``"s"``, ``"GB"``.
        p20, p50, p80: quantiles of the repeats; equal where a quantity is measured once.
        ratios: how many times faster than something else in the same run, by its name; a name that ends in "share" is
            that share of the other's, lower is better.
        goal: what the first ratio, or ``copy_share``, is held against; None where nothing was promised.
        reached: whether it holds.
        bytes_moved: the least that has to be read and written.
        copy_share: ``bytes_moved`` over the time, as a share of what a copy on this device reaches.
        detail: further figures, as text.
        environment: device, versions, commit and date.
    """

    measured: str
    implementation: str
    backbone: str
    image_size: int
    batch_size: int
    dtype: str
    unit: str
    p20: float
    p50: float
    p80: float
    ratios: dict[str, float] = field(default_factory=dict)
    goal: float | None = None
    reached: bool | None = None
    bytes_moved: int | None = None
    copy_share: float | None = None
    detail: str = ""
    environment: dict[str, Any] = field(default_factory=dict)


def write_rows(path: str | Path, rows: Sequence[Row], options: Any) -> None:
    """Write rows, and the options they were measured with, as JSON."""
    write_json(path, {"format": FORMAT, "options": options, "rows": list(rows)})


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table; a column that no row fills is left out.

    ``copy`` is the share of a copy's bandwidth, ``/ name`` how many times faster than ``name``.
    """
    columns = {
        "measured": [row.measured for row in rows],
        "ran": [row.implementation for row in rows],
        "model": [f"{row.backbone} {row.image_size or ''}".rstrip() for row in rows],
        "batch": [str(row.batch_size) for row in rows],
        "median": [f"{row.p50:.4g} {row.unit}" for row in rows],
        "p20-p80": [f"{row.p20:.4g}-{row.p80:.4g}" if row.p20 != row.p80 else "" for row in rows],
        "copy": ["" if row.copy_share is None else f"{row.copy_share:.0%}" for row in rows],
    }
    for name in dict.fromkeys(name for row in rows for name in row.ratios):
        columns[f"/ {name}"] = [f"{row.ratios[name]:.2f} x" if name in row.ratios else "" for row in rows]
    columns["goal"] = ["" if row.goal is None else f"{row.goal:.2f}" for row in rows]
    columns["reached"] = ["" if row.reached is None else "yes" if row.reached else "NO" for row in rows]
    columns["detail"] = [row.detail for row in rows]
    filled = {name: values for name, values in columns.items() if any(values)}
    return tabulate(filled, headers="keys", disable_numparse=True)
