"""Value against speed, drawn as a picture and as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pyra.files import atomic_path, write_text
from pyra.tasks.reports.layout import Plot
from pyra.tasks.reports.page import page
from pyra.tasks.reports.png import figure
from pyra.tasks.results import RunResult


def pareto_plot(
    rows: Sequence[RunResult],
    png: str | os.PathLike[str],
    html: str | os.PathLike[str],
    title: str = "Accuracy against speed",
) -> None:
    """Draw value against measured images/s as a picture (1920 x 1200 pixels) and as one self-contained page.

    Colour and area of a point show its MACs, the line is the Pareto front; where a row was not measured, MACs take
    the place of images/s for all rows. The page needs no network, fits a phone, follows the light or dark mode of
    the reader and shows the table of results below the plot. Both files are written atomically.

    Raises:
        ValueError: no rows, or rows of several tasks or metrics.
    """
    plot = Plot(rows)
    text = page(plot, rows, title)
    with atomic_path(Path(png)) as temporary:
        figure(plot, title).savefig(temporary, format="png", dpi=144)
    write_text(Path(html), text)
