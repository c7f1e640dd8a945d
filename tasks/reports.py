"""Tables and plots of results: the only module that draws with matplotlib and plotly, both imported when used."""

from __future__ import annotations

import dataclasses
import html as html_escape
import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyra.tasks.results import RunResult, write_atomically

if TYPE_CHECKING:
    import numpy.typing as npt

_PERCENT = {"accuracy": "top-1 (%)", "top1": "top-1 (%)", "top-1": "top-1 (%)", "top5": "top-5 (%)"}
_FRONT = "#D55E00"

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def results_table(
    rows: Sequence[RunResult],
    style: Literal["plain", "markdown"] = "plain",
    baseline: RunResult | str | None = None,
) -> str:
    """Return the rows as a table with one header line.

    ``baseline`` (a row, or the method name of one) adds the difference in points to it and makes it the 1.00x of the
    speed-up column; without it the speed-up is the one each run measured. What was not measured shows as "-".

    Raises:
        ValueError: an unknown style, or no row of the baseline's name.
    """
    if style not in ("plain", "markdown"):
        raise ValueError(f"style is 'plain' or 'markdown', not {style!r}")
    return _tabulated(rows, {"plain": "simple", "markdown": "pipe"}[style], baseline)


def _tabulated(rows: Sequence[RunResult], style: str, baseline: RunResult | str | None) -> str:
    from tabulate import tabulate

    columns = _columns(rows, _baseline(rows, baseline))
    texts = {"task", "method"}
    cells = [list(line) for line in zip(*columns.values(), strict=True)]
    if style == "pipe":
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    align = ["left" if name in texts else "right" for name in columns]
    return str(tabulate(cells, list(columns), tablefmt=style, disable_numparse=True, colalign=align if cells else None))


def _baseline(rows: Sequence[RunResult], baseline: RunResult | str | None) -> RunResult | None:
    if not isinstance(baseline, str):
        return baseline
    for row in rows:
        if row.method == baseline:
            return row
    raise ValueError(f"no row of method {baseline!r}; there are {sorted({row.method for row in rows})}")


def _columns(rows: Sequence[RunResult], baseline: RunResult | None) -> dict[str, list[str]]:
    metrics = {row.metric for row in rows}
    score = _score_name(rows)
    columns: dict[str, list[str]] = {}
    if len({row.task for row in rows}) > 1:
        columns["task"] = [row.task for row in rows]
    columns["method"] = [row.method for row in rows]
    if len({row.seed for row in rows}) > 1:
        columns["seed"] = [str(row.seed) for row in rows]
    columns["rate"] = [f"{row.rate:.2f}" for row in rows]
    columns[score] = [_score(row, with_name=len(metrics) > 1) for row in rows]
    if baseline is not None:
        columns["difference"] = [f"{_shown(row) - _shown(baseline):+.{_digits(row)}f}" for row in rows]
    columns["trained parameters"] = [f"{row.trained_parameters:,}" for row in rows]
    unit, size = _macs_unit(rows)
    columns[f"MACs ({unit})"] = [_significant(row.macs / size) for row in rows]
    columns["images/s"] = [_optional(row.images_per_second, "") for row in rows]
    columns["speed-up"] = [_optional(_speedup(row, baseline), "x") for row in rows]
    return columns


def _score_name(rows: Sequence[RunResult]) -> str:
    metrics = {row.metric for row in rows}
    if len(metrics) != 1:
        return "value"
    metric = metrics.pop()
    return _PERCENT.get(metric, metric)


def _shown(row: RunResult) -> float:
    """The value as people read it: an accuracy in percent."""
    return 100 * row.value if row.metric in _PERCENT else row.value


def _digits(row: RunResult) -> int:
    return 1 if row.metric in _PERCENT else 3


def _score(row: RunResult, with_name: bool = False) -> str:
    text = f"{_shown(row):.{_digits(row)}f}"
    return f"{_PERCENT.get(row.metric, row.metric)} {text}" if with_name else text


def _macs_unit(rows: Sequence[RunResult]) -> tuple[str, float]:
    return ("G", 1e9) if max((row.macs for row in rows), default=0) >= 1e9 else ("M", 1e6)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _optional(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if unit else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _speedup(row: RunResult, baseline: RunResult | None) -> float | None:
    if baseline is None:
        return row.speedup
    if not row.images_per_second or not baseline.images_per_second:
        return None
    return row.images_per_second / baseline.images_per_second


def pareto_front(rows: Sequence[RunResult]) -> list[RunResult]:
    """Return the rows that no other row beats, cheapest first.

    A row is beaten by one at least as good in value and in speed and better in one of them. Speed is images/s where
    every row measured it, otherwise fewer MACs. Rows that tie in both all stay, in their given order.

    Raises:
        ValueError: rows of several tasks or metrics, which cannot be compared.
    """
    compared = sorted({(row.task, row.metric) for row in rows})
    if len(compared) > 1:
        raise ValueError(f"a front needs rows of one task and metric, these are {compared}")
    measured = _measured(rows)
    # Best value first within a speed, so a row is on the front if it is the best so far, or equals that row.
    order = sorted(rows, key=lambda row: (-_speed(row, measured), -row.value))
    front: list[RunResult] = []
    for row in order:
        last = front[-1] if front else None
        tie = last is not None and (row.value, _speed(row, measured)) == (last.value, _speed(last, measured))
        if last is None or row.value > last.value or tie:
            front.append(row)
    return front


def _measured(rows: Sequence[RunResult]) -> bool:
    return all(row.images_per_second is not None for row in rows)


def _speed(row: RunResult, measured: bool) -> float:
    return float(row.images_per_second or 0) if measured else -float(row.macs)


@dataclass(frozen=True)
class _Frame:
    """A plot area in pixels and the ranges its axes show (x in log10 when ``log``; reversed ranges are fine)."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    @property
    def bounds(self) -> Box:
        return self.left, self.top, self.width - self.right, self.height - self.bottom

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a data point, y downwards."""
        x = math.log10(x) if self.log else x
        left, top, right, bottom = self.bounds
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def _frame(points: Sequence[tuple[float, float]], reverse: bool, width: float, height: float) -> _Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    xs = [math.log10(x) for x in xs] if log else xs
    x_pad = 0.12 * (max(xs) - min(xs)) or 0.1 * abs(xs[0]) or 1.0
    y_pad = 0.15 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
    x_range = (min(xs) - x_pad, max(xs) + x_pad)
    y_range = (min(ys) - y_pad, max(ys) + y_pad)
    return _Frame(width, height, 62, 16, 16, 56, x_range[::-1] if reverse else x_range, y_range, log)


def place_labels(
    points: Sequence[tuple[float, float]],
    radii: Sequence[float],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    lines: Sequence[Box] = (),
) -> list[Box | None]:
    """Place one label beside each point so that no two labels overlap and none covers a point or leaves ``bounds``.

    Every label takes the nearest free place; covering one of ``lines`` (vertical or horizontal, as boxes) or leading
    a line from point to label across something else counts as extra distance. Labels of crowded points are placed
    first; one that fits nowhere is None. All lengths are pixels.
    """
    placed: list[Box | None] = [None] * len(points)
    discs = [(x - r - 2, y - r - 2, x + r + 2, y + r + 2) for (x, y), r in zip(points, radii, strict=True)]
    segments = np.array(lines, dtype=float).reshape(-1, 4)

    def crowd(index: int) -> float:
        return sum(1 / (1 + math.dist(points[index], other)) for other in points)

    for index in sorted(range(len(points)), key=crowd, reverse=True):
        taken = np.array([*discs, *(box for box in placed if box is not None)])
        others = np.delete(taken, index, axis=0)
        for places in _places(points[index], radii[index] + 4, sizes[index], bounds):
            places = places[~_overlaps(places, taken).any(1)]
            if not len(places):
                continue
            nearest = np.clip(np.array(points[index]), places[:, :2], places[:, 2:])
            cost = np.hypot(*(nearest - points[index]).T)
            centres = (places[:, :2] + places[:, 2:]) / 2
            cost += 25 * _overlaps(places, segments).sum(1) + 40 * _crossed(points[index], centres, others).sum(1)
            left, top, right, bottom = places[cost.argmin()].tolist()
            placed[index] = (left, top, right, bottom)
            if cost.min() < 25:
                break
    return placed


def _places(
    point: tuple[float, float], gap: float, size: tuple[float, float], bounds: Box
) -> Iterator[npt.NDArray[np.float64]]:
    """Yield places [P, 4] for one label inside ``bounds``: those around the point, then those plus a wide grid."""
    (x, y), (w, h), near = point, size, 0.7 * gap
    left, top, right, bottom = bounds
    around = np.array(
        [
            (x + gap, y - h / 2), (x - w / 2, y - gap - h), (x - w / 2, y + gap), (x - gap - w, y - h / 2),
            (x + near, y - near - h), (x - near - w, y - near - h), (x + near, y + near), (x - near - w, y + near),
        ]
    )  # fmt: skip
    columns, rows = np.meshgrid(np.arange(left, right - w, 12.0), np.arange(top, bottom - h, 7.0))
    grid = np.stack([columns.ravel(), rows.ravel()], axis=1)
    for corners in (around, np.concatenate([around, grid])):
        boxes = np.concatenate([corners, corners + np.array([w, h])], axis=1)
        yield boxes[((boxes[:, :2] >= (left, top)) & (boxes[:, 2:] <= (right, bottom))).all(1)]


def _overlaps(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which boxes [P, 4] touch which boxes [K, 4], as [P, K]."""
    a, b = a[:, None], b[None]
    touch: npt.NDArray[np.bool_] = np.all((a[..., :2] <= b[..., 2:]) & (b[..., :2] <= a[..., 2:]), axis=-1)
    return touch


def _crossed(
    start: tuple[float, float], ends: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Which segments from ``start`` to ``ends`` [P, 2] pass through which ``boxes`` [K, 4], as [P, K]."""
    direction = (ends - start)[:, None]
    direction = np.where(np.abs(direction) < 1e-6, 1e-6, direction)
    first, second = (boxes[None, :, :2] - start) / direction, (boxes[None, :, 2:] - start) / direction
    enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return (enter <= leave) & (leave >= 0) & (enter <= 1)


def _distance(point: tuple[float, float], box: Box) -> float:
    return math.dist(point, (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])))


@dataclass(frozen=True)
class _Plot:
    """Everything both drawings share. ``xs``: images/s, or MACs in ``macs_unit`` where a row was not measured."""

    rows: list[RunResult]
    front: list[RunResult]
    labels: list[str]
    xs: list[float]
    ys: list[float]
    macs: list[float]
    macs_unit: str
    x_title: str
    y_title: str
    measured: bool

    @property
    def diameters(self) -> list[float]:
        """Marker diameters in pixels: the area grows with the MACs."""
        return [8 + 12 * math.sqrt(value / max(self.macs)) for value in self.macs]

    @property
    def line(self) -> tuple[list[float], list[float]]:
        """Corners of the front: the best value at each speed, falling at a point to the next faster one."""
        points = sorted({self.point(row) for row in self.front}, key=lambda p: p[0], reverse=not self.measured)
        xs, ys = [points[0][0]], [points[0][1]]
        for x, y in points[1:]:
            xs += [xs[-1], x]
            ys += [y, y]
        return xs, ys

    def point(self, row: RunResult) -> tuple[float, float]:
        index = next(i for i, other in enumerate(self.rows) if other is row)
        return self.xs[index], self.ys[index]

    def on_front(self, index: int) -> bool:
        return any(row is self.rows[index] for row in self.front)

    def layout(self, width: float, height: float, font: float) -> tuple[_Frame, list[Box | None]]:
        """Return the axes at this size and the place of every label."""
        frame = _frame(list(zip(self.xs, self.ys, strict=True)), not self.measured, width, height)
        pixels = [frame.pixel(x, y) for x, y in zip(self.xs, self.ys, strict=True)]
        corners = [frame.pixel(x, y) for x, y in zip(*self.line, strict=True)]
        lines = [
            (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in itertools.pairwise(corners)
        ]
        sizes = [_text_size(label, font) for label in self.labels]
        return frame, place_labels(pixels, [d / 2 for d in self.diameters], sizes, frame.bounds, lines)


def _colours() -> list[str]:
    """Cividis (even to colour-blind eyes) without its darkest quarter, which a dark page would swallow."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in matplotlib.colormaps["cividis"](np.linspace(0.25, 1, 32))]


def _text_size(text: str, font: float) -> tuple[float, float]:
    """Size in pixels of a label in matplotlib's font, which is wider than the sans-serif fonts of browsers."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=font), False)
    return float(width) + 6, 1.35 * font


def _labels(rows: Sequence[RunResult]) -> list[str]:
    """Method names, shortened to 28 characters; the rate and then the seed follow where a name would stand twice."""
    labels = [row.method if len(row.method) <= 28 else row.method[:27] + "…" for row in rows]
    for details in ([f" {row.rate:.2f}" for row in rows], [f", seed {row.seed}" for row in rows]):
        doubled = {label for label in labels if labels.count(label) > 1}
        labels = [label + detail * (label in doubled) for label, detail in zip(labels, details, strict=True)]
    return labels


def _plot(rows: Sequence[RunResult]) -> _Plot:
    rows = [dataclasses.replace(row) for row in rows]
    if not rows:
        raise ValueError("no results to plot")
    measured = _measured(rows)
    unit, size = _macs_unit(rows)
    macs = [row.macs / size for row in rows]
    batches = {row.throughput_batch_size for row in rows}
    batch = f" (batch {batches.pop()})" if len(batches) == 1 and None not in batches else ""
    return _Plot(
        rows=rows,
        front=pareto_front(rows),
        labels=_labels(rows),
        xs=[float(row.images_per_second or 0) for row in rows] if measured else macs,
        ys=[_shown(row) for row in rows],
        macs=macs,
        macs_unit=unit,
        x_title=f"images/s{batch}, faster →" if measured else f"MACs ({unit}), cheaper →",
        y_title=_score_name(rows),
        measured=measured,
    )


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
    plot = _plot(rows)
    write_atomically(Path(png), _png(plot, title))
    write_atomically(Path(html), _page(plot, title).encode())


def _png(plot: _Plot, title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    width, height, head, point = 960, 600, 54, 0.72  # 100 pixels an inch, saved at twice that; 1 pixel = 0.72 pt
    frame, boxes = plot.layout(width - 92, height - head, 14)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left, top, right, bottom = frame.bounds
    axes = figure.add_axes(
        (left / width, 1 - (head + bottom) / height, (right - left) / width, (bottom - top) / height),
        xscale="log" if frame.log else "linear",
    )
    axes.set_xlim(*(10**x if frame.log else x for x in frame.x_range))
    axes.set_ylim(*frame.y_range)
    if frame.log:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=13 * point, color="#888888", labelcolor="#333333")
    axes.set_xlabel(plot.x_title, fontsize=14 * point, color="#333333")
    axes.set_ylabel(plot.y_title, fontsize=14 * point, color="#333333")
    figure.text(
        left / width, 1 - 34 / height, title, fontsize=19 * point, fontweight="bold", color="#111111", parse_math=False
    )
    axes.plot(*plot.line, color=_FRONT, linewidth=2 * point, zorder=2)
    edges = [_FRONT if plot.on_front(i) else "#8a8a8a" for i in range(len(plot.rows))]
    areas = [(d * point) ** 2 for d in plot.diameters]
    dots = axes.scatter(
        plot.xs,
        plot.ys,
        s=areas,
        c=plot.macs,
        cmap=ListedColormap(_colours()),
        vmin=0,
        vmax=max(plot.macs),
        edgecolors=edges,
        linewidths=1.6 * point,
        zorder=3,
    )
    for x, y, label, box in zip(plot.xs, plot.ys, plot.labels, boxes, strict=True):
        if box is not None:
            px, py = frame.pixel(x, y)
            offset = ((box[0] + box[2]) / 2 - px) * point, (py - (box[1] + box[3]) / 2) * point
            far = _distance((px, py), box) > 26
            leader = {"arrowstyle": "-", "color": "#999999", "lw": 0.8} if far else None
            axes.annotate(
                label, (x, y), offset, textcoords="offset points", fontsize=14 * point, ha="center", va="center",
                color="#111111", parse_math=False, arrowprops=leader,
            )  # fmt: skip
    bar_axes = figure.add_axes(
        ((width - 84) / width, 1 - (head + bottom) / height, 14 / width, (bottom - top) / height)
    )
    bar = figure.colorbar(dots, cax=bar_axes)
    bar.set_label(f"MACs ({plot.macs_unit})", fontsize=13 * point, color="#333333")
    bar.ax.tick_params(labelsize=12 * point, color="#888888", labelcolor="#333333")
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


_WIDTHS = (288, 320, 340, 358, 380, 400, 440, 500, 580, 660, 740, 840, 940, 1060)


def _page(plot: _Plot, title: str) -> str:
    """Return the page. Labels are placed for several widths; the script picks the widest that fits the reader's."""
    from plotly.offline import get_plotlyjs

    traces, layout = _traces(plot), _layout(plot)
    steps = [_step(plot, width) for width in _WIDTHS]
    table = _tabulated(plot.rows, "html", None)
    data = json.dumps({"traces": traces, "layout": layout, "steps": steps}).replace("</", "<\\/")
    values = {
        "TITLE": html_escape.escape(title),
        "ALT": html_escape.escape(f"{title}: " + "; ".join(_summary(plot, i) for i in range(len(plot.rows)))),
        "TABLE": table,
        "NOTE": html_escape.escape(_note(plot)),
        "DATA": data,
        "PLOTLY": get_plotlyjs(),
    }
    parts = _TEMPLATE.split("@@")
    return "".join(values[part] if index % 2 else part for index, part in enumerate(parts))


def _summary(plot: _Plot, index: int) -> str:
    speed = f", {_optional(plot.rows[index].images_per_second, '')} images/s" if plot.measured else ""
    return f"{plot.labels[index]} {_score(plot.rows[index])}{speed}"


def _note(plot: _Plot) -> str:
    devices = sorted({str(row.environment["device"]) for row in plot.rows if row.environment.get("device")})
    where = f" Measured on {', '.join(devices)}." if plot.measured and devices else ""
    return f"The line is the Pareto front: no other row is both better and faster. Colour and area show MACs.{where}"


def _hover(plot: _Plot, index: int) -> str:
    row = plot.rows[index]
    speed = "" if row.speedup is None else f" ({_optional(row.speedup, 'x')})"
    lines = [
        f"<b>{html_escape.escape(plot.labels[index])}</b>",
        f"{_PERCENT.get(row.metric, row.metric)}: {_score(row)}",
        f"images/s: {_optional(row.images_per_second, '')}{speed}",
        f"MACs: {_significant(plot.macs[index])} {plot.macs_unit}, {row.rate:.0%} fewer",
        f"trained parameters: {row.trained_parameters:,}",
        f"seed: {row.seed}",
    ]
    return "<br>".join(lines)


def _traces(plot: _Plot) -> list[dict[str, Any]]:
    xs, ys = plot.line
    colourbar = {
        "title": {"text": f"MACs ({plot.macs_unit})", "side": "right"},
        "orientation": "h", "thickness": 10, "len": 1, "y": 1, "yanchor": "bottom", "outlinewidth": 0,
    }  # fmt: skip
    colours = _colours()
    scale = [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]
    marker = {
        "color": plot.macs, "cmin": 0, "cmax": max(plot.macs), "colorscale": scale, "showscale": True,
        "colorbar": colourbar, "opacity": 1, "size": plot.diameters,
        "line": {"width": 2, "color": [_FRONT if plot.on_front(i) else "#8a8a8a" for i in range(len(plot.rows))]},
    }  # fmt: skip
    return [
        {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "hoverinfo": "skip",
         "line": {"color": _FRONT, "width": 2}},
        {
            "type": "scatter", "mode": "markers", "x": plot.xs, "y": plot.ys, "marker": marker, "cliponaxis": False,
            "text": [_hover(plot, i) for i in range(len(plot.rows))], "hovertemplate": "%{text}<extra></extra>",
        },
    ]  # fmt: skip


def _layout(plot: _Plot) -> dict[str, Any]:
    axis = {"zeroline": False, "fixedrange": True, "automargin": False}
    return {
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
        "xaxis": axis | {"title": {"text": plot.x_title, "standoff": 8}},
        "yaxis": axis | {"title": {"text": plot.y_title, "standoff": 4}},
    }


_COLOURBAR_HEIGHT = 52
_LABEL_FONT = 13


def _step(plot: _Plot, width: int) -> dict[str, Any]:
    """Size, axis ranges and labels of the plot at one width."""
    for height in range(400 if width < 600 else 500, 1000, 100):
        frame, boxes = plot.layout(width, height, _LABEL_FONT)
        points = [frame.pixel(x, y) for x, y in zip(plot.xs, plot.ys, strict=True)]
        # A label further away than this is hard to follow back to its point; a higher plot has more room.
        if all(box is not None and _distance(point, box) < 70 for point, box in zip(points, boxes, strict=True)):
            break
    annotations = []
    for x, y, label, box in zip(plot.xs, plot.ys, plot.labels, boxes, strict=True):
        if box is not None:
            px, py = frame.pixel(x, y)
            annotations.append(
                {
                    "x": math.log10(x) if frame.log else x, "y": y, "text": html_escape.escape(label),
                    "showarrow": True, "arrowhead": 0, "arrowwidth": 1, "borderpad": 0,
                    "arrowcolor": "#8a8a8a" if _distance((px, py), box) > 26 else "rgba(0,0,0,0)",
                    "ax": round((box[0] + box[2]) / 2 - px, 1), "ay": round((box[1] + box[3]) / 2 - py, 1),
                    "font": {"size": _LABEL_FONT},
                }
            )  # fmt: skip
    return {
        "width": width,
        "height": height + _COLOURBAR_HEIGHT,
        "margin": {"l": frame.left, "r": frame.right, "t": frame.top + _COLOURBAR_HEIGHT, "b": frame.bottom},
        "xaxis.range": list(frame.x_range),
        "xaxis.type": "log" if frame.log else "linear",
        "yaxis.range": list(frame.y_range),
        "annotations": annotations,
    }


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>@@TITLE@@</title>
<style>
:root { --ink: #1a1a1a; --soft: #595959; --grid: #e4e4e4; --page: #ffffff; --head: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #b0b0b0; --grid: #3a3a3a; --page: #161616; --head: #222222; }
}
body { margin: 0 auto; max-width: 1060px; padding: 16px; font: 16px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; }
#plot { min-height: 450px; overflow: hidden; }
#plot > div { margin: 0 auto; }
#plot .annotation-text, #plot .annotation-text tspan { fill: var(--ink) !important; }
#plot .xtick text, #plot .ytick text, #plot .g-xtitle text, #plot .g-ytitle text, #plot .colorbar text {
  fill: var(--soft) !important; }
#plot .gridlayer path { stroke: var(--grid) !important; }
p { color: var(--soft); font-size: .9rem; }
.rows { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { text-align: left; background: var(--head); font-weight: 600; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
th:first-child { background: var(--head); }
</style>
</head>
<body>
<h1>@@TITLE@@</h1>
<div id="plot" role="img" aria-label="@@ALT@@"><noscript>The plot needs JavaScript; the table does not.</noscript></div>
<p>@@NOTE@@</p>
<div class="rows">
@@TABLE@@
</div>
<script>@@PLOTLY@@</script>
<script>
const { traces, layout, steps } = @@DATA@@;
const plot = document.getElementById("plot");
const inner = plot.appendChild(document.createElement("div"));
let shown = null;
function fit() {
  const step = steps.findLast(s => s.width <= plot.clientWidth) || steps[0];
  if (step === shown) return;
  shown = step;
  inner.style.width = step.width + "px";
  const { "xaxis.range": x, "xaxis.type": type, "yaxis.range": y, ...rest } = step;
  const axes = { xaxis: { ...layout.xaxis, range: [...x], type }, yaxis: { ...layout.yaxis, range: [...y] } };
  Plotly.react(inner, traces, { ...layout, ...structuredClone(rest), ...axes },
    { displayModeBar: false, responsive: false, scrollZoom: false });
}
fit();
new ResizeObserver(fit).observe(plot);
</script>
</body>
</html>
"""
