"""What ``pyra benchmark decoder`` measures, by name, and its table: one line a length of prompt and model."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from pyra.tasks.benchmarks.decoder_options import STOCK
from pyra.tasks.benchmarks.rows import Row

PREFILL, FIRST_TOKEN, ANSWER, CACHE, PEAK = "prefill", "first token", "answer", "key-value cache", "peak of a prefill"
_ORDER = (PREFILL, "MACs", FIRST_TOKEN, ANSWER, CACHE, PEAK)


def summary(rows: Sequence[Row]) -> str:
    """Return a table of one line a length and model, instead of the rows."""
    lines: dict[tuple[int, str], dict[str, str]] = {}
    for row in rows:
        what, _, length = row.measured.rpartition(", ")
        ratio, share = row.ratios.get(STOCK), row.ratios.get(f"{STOCK} share")
        missed = "" if row.reached is not False else " (goal missed)"
        line = lines.setdefault((int(length.split()[0]), row.implementation), {})
        line[what] = f"{row.p50:.4g} {row.unit}"
        if ratio is not None or share is not None:
            line[f"/ {what}"] = (f"{ratio:.2f} x" if ratio is not None else f"{share:.2f}") + missed
        if what == PREFILL:
            line["MACs"] = row.detail.split(";")[0].split()[-1] + " x"
    columns = list(dict.fromkeys(key for line in lines.values() for key in line))
    columns.sort(key=lambda name: _ORDER.index(name.removeprefix("/ ")))
    body = [[tokens, ran, *(line.get(name, "") for name in columns)] for (tokens, ran), line in lines.items()]
    head = ["prompt", "ran", *(f"/ {STOCK}" if name.startswith("/ ") else name for name in columns)]
    return tabulate(body, headers=head, disable_numparse=True)
