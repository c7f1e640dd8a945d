"""Curves of trainings side by side, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.files import atomic_path

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#555555")  # told apart by colour-blind eyes
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.4, 3.0

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One quantity.

    Attributes:
        title: what it is.
        x: what it is drawn over.
        lines: by label, a line of (x, y) a seed; of several their mean is drawn, and each of them faintly.
    """

    title: str
    x: str
    lines: Mapping[str, Sequence[Line]]


def draw_curves(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Write a picture with a field for each quantity; the file is written atomically.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("no curves to draw")
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    drawing = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), facecolor="white", layout="constrained")
    fields = drawing.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(fields.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[place]
        for label, lines in panel.lines.items():
            colour = _COLOURS[labels.index(label) % len(_COLOURS)]
            if len(lines) > 1:
                for line in lines:
                    axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(*zip(*mean_line(lines), strict=True), color=colour, linewidth=1.8, label=label)
        axes.set_title(panel.title, size=11, parse_math=False)
        axes.set_xlabel(panel.x, size=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    fields.flat[0].legend(fontsize=9, frameon=False)
    with atomic_path(Path(path)) as temporary:
        drawing.savefig(temporary, format="png", dpi=110)


def mean_line(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Return the mean of lines at each x that all of them have.

    >>> mean_line([[(1, 0.0), (2, 1.0)], [(1, 1.0)]])
    [(1, 0.5)]
    """
    values = [dict(line) for line in lines]
    shared = [x for x in values[0] if all(x in other for other in values)]
    return [(x, sum(line[x] for line in values) / len(values)) for x in shared]
