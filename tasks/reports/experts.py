"""The table of models with fewer experts: what each costs, and how well it expects the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from pyra.tasks.language.compression import Variant

_HEADERS = ("model", "experts", "active", "parameters", "MB", "active parameters", "MACs a token", "NLL", "difference")


def experts_table(variants: Sequence[Variant], style: str = "simple") -> str:
    """Return a row a model; NLL in nats a token of the answers, the difference to the first with its standard error."""
    rows = [
        (
            one.name,
            str(one.experts),
            str(one.active),
            f"{one.parameters:,}",
            f"{one.bytes / 1e6:,.1f}",
            f"{one.active_parameters:,}",
            f"{one.macs:,}",
            f"{one.nll:.4f}",
            "" if one.difference is None else f"{one.difference:+.4f} ± {one.error:.4f}",
        )
        for one in variants
    ]
    align = ("left", *["right"] * (len(_HEADERS) - 1))
    return str(tabulate(rows, headers=_HEADERS, tablefmt=style, colalign=align, disable_numparse=True))
