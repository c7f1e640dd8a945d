"""The table of models with rounded experts: how well each expects the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from pyra.tasks.language.rounding_study import RoundingRow

_HEADERS = ("model", "bits", "group", "seed", "NLL", "difference", "over the control")


def rounding_table(rows: Sequence[RoundingRow], style: str = "simple") -> str:
    """Return a row a model; NLL in nats a token of the answers, differences with their standard errors."""
    cells = [
        (
            one.name,
            *("" if value is None else str(value) for value in (one.bits, one.group_size, one.seed)),
            f"{one.nll:.4f}",
            _pair(one.difference, one.error),
            _pair(one.over_control, one.over_control_error),
        )
        for one in rows
    ]
    align = ("left", *["right"] * (len(_HEADERS) - 1))
    return str(tabulate(cells, headers=_HEADERS, tablefmt=style, colalign=align, disable_numparse=True))


def _pair(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:+.4f} ± {error:.4f}"
