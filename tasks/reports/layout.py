"""What both drawings of results share: points, front line, axis ranges and the places of the labels, in pixels."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyra.tasks.reports.front import all_timed, front_indices
from pyra.tasks.reports.placement import Box, Pair, place_labels
from pyra.tasks.reports.table import macs_unit, shown_value, value_name
from pyra.tasks.results import RunResult

FRONT = "#D55E00"
OTHERS = "#8a8a8a"
# Cividis (even to colour-blind eyes) without its darkest quarter, which a dark page would swallow.
COLOURS = ("#434e6c", "#666970", "#888578", "#aea371", "#d6c35d", "#fee838")

MANY, _NAMED = 40, 10


@dataclass(frozen=True)
class Label:
    """A text beside the data point (``x``, ``y``); ``offset`` leads from the point to the middle of the text."""

    text: str
    x: float
    y: float
    offset: Pair
    distance: float

    @property
    def led(self) -> bool:
        """Whether the text is so far from its point that a line must lead to it."""
        return self.distance > 26


class Plot:
    """The contents of a plot: ``xs`` are images/s, or MACs where some row was not timed (the axis then falls).

    More than :data:`MANY` rows are drawn small, and some of the front are named.

    Args:
        rows: to draw.
        names: of the rows; their methods by default.
        spreads: standard deviations of the values, which are drawn where there are few rows.

    Raises:
        ValueError: no rows, or rows of several tasks or metrics.
    """

    def __init__(
        self,
        rows: Sequence[RunResult],
        names: Sequence[str] | None = None,
        spreads: Sequence[float | None] | None = None,
    ) -> None:
        if not rows:
            raise ValueError("no results to plot")
        timed = all_timed(rows)
        unit, size = macs_unit(rows)
        batches = {row.throughput_batch_size for row in rows}
        batch = f" (batch {batches.pop()})" if len(batches) == 1 and None not in batches else ""
        self.front = front_indices(rows)
        many = len(rows) > MANY
        self.names = _names(rows) if names is None else list(names)
        self.labelled = _spread(self.front, _NAMED) if many else list(range(len(rows)))
        self.macs = [row.macs / size for row in rows]
        self.xs = [row.images_per_second or 0.0 for row in rows] if timed else self.macs
        self.ys = [shown_value(row) for row in rows]
        scale = [shown_value(row) / row.value if row.value else 1.0 for row in rows]
        deviations = [None] * len(rows) if many or spreads is None else spreads
        self.spreads = [None if d is None else d * s for d, s in zip(deviations, scale, strict=True)]
        self.x_range = _range(self.xs) if timed else _range(self.xs)[::-1]
        reach = [d or 0.0 for d in self.spreads]
        self.y_range = _range([y + sign * d for y, d in zip(self.ys, reach, strict=True) for sign in (-1, 1)])
        self.x_title = f"images/s{batch}, faster →" if timed else f"MACs ({unit}), cheaper →"
        self.y_title = value_name(rows)
        self.macs_title = f"MACs ({unit})"
        self.most_macs = max(self.macs) or 1.0
        size = 0.4 if many else 1.0
        self.diameters = [size * (8 + 12 * math.sqrt(macs / self.most_macs)) for macs in self.macs]  # area: MACs
        front = set(self.front)
        self.edges = [FRONT if index in front else OTHERS for index in range(len(rows))]
        self.edge_widths = [0.0 if many and index not in front else 1.6 for index in range(len(rows))]

    @property
    def line(self) -> tuple[list[float], list[float]]:
        """Corners of the front, fastest first: the best value at each speed, rising at the next slower point."""
        points = list(dict.fromkeys((self.xs[index], self.ys[index]) for index in self.front))
        xs, ys = [points[0][0]], [points[0][1]]
        for x, y in points[1:]:
            xs += [x, x]
            ys += [ys[-1], y]
        return xs, ys

    def pixels(self, area: Box, xs: Sequence[float], ys: Sequence[float]) -> list[Pair]:
        """Return where data points are drawn when the axes fill ``area``."""
        left, top, right, bottom = area
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return [
            (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
            for x, y in zip(xs, ys, strict=True)
        ]

    def labels(self, area: Box, font: float) -> list[Label]:
        """Return the labels of all points that have room for one, for a font size in pixels."""
        points = self.pixels(area, self.xs, self.ys)
        lines = [
            (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1]))
            for a, b in itertools.pairwise(self.pixels(area, *self.line))
        ]
        sizes = [_text_size(self.names[i], font) for i in self.labelled]
        radii = [self.diameters[i] / 2 for i in self.labelled]
        boxes = place_labels([points[i] for i in self.labelled], radii, sizes, area, lines)
        labels = []
        for i, box in zip(self.labelled, boxes, strict=True):
            if box is not None:
                px, py = points[i]
                left, top, right, bottom = box
                distance = math.dist((px, py), (min(max(px, left), right), min(max(py, top), bottom)))
                labels.append(
                    Label(
                        self.names[i],
                        self.xs[i],
                        self.ys[i],
                        ((left + right) / 2 - px, (top + bottom) / 2 - py),
                        distance,
                    )
                )
        return labels


def _spread(places: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the places, at even distances."""
    step = max(1.0, (len(places) - 1) / (count - 1))
    return [places[round(k * step)] for k in range(min(len(places), count))]


def _range(values: Sequence[float]) -> Pair:
    low, high = min(values), max(values)
    pad = 0.13 * (high - low) or 0.1 * abs(low) or 1.0
    return low - pad, high + pad


def _names(rows: Sequence[RunResult]) -> list[str]:
    """Method names, shortened to 28 characters; the rate and then the seed follow where a name would stand twice."""
    names = [row.method if len(row.method) <= 28 else row.method[:27] + "…" for row in rows]
    for details in ([f" {row.rate:.2f}" for row in rows], [f", seed {row.seed}" for row in rows]):
        doubled = {name for name, count in Counter(names).items() if count > 1}
        names = [name + detail * (name in doubled) for name, detail in zip(names, details, strict=True)]
    return names


def _text_size(text: str, font: float) -> Pair:
    """Size of a label in matplotlib's font, which is wider than the sans-serif fonts of browsers."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=font), False)
    return float(width) + 6, 1.35 * font
