"""The plot as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyra.tasks.reports.layout import COLOURS, FRONT, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 960, 600
_AREA = (62.0, 70.0, 852.0, 544.0)
_BAR = (876.0, 70.0, 890.0, 544.0)
_GREY, _SOFT, _INK = "#888888", "#333333", "#111111"


def figure(plot: Plot, title: str) -> Figure:
    """Draw 960 x 600 pixels at 72 dots an inch, so that points (of fonts and lines) are pixels."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    drawing = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="white")
    drawing.text(_AREA[0] / _WIDTH, 1 - 34 / _HEIGHT, title, size=19, weight="bold", color=_INK, parse_math=False)
    axes = drawing.add_axes(_share(_AREA), xlim=plot.x_range, ylim=plot.y_range, axisbelow=True)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=13, color=_GREY, labelcolor=_SOFT)
    axes.set_xlabel(plot.x_title, size=14, color=_SOFT)
    axes.set_ylabel(plot.y_title, size=14, color=_SOFT)
    axes.plot(*plot.line, color=FRONT, linewidth=2, zorder=2)
    for x, y, spread in zip(plot.xs, plot.ys, plot.spreads, strict=True):
        if spread is not None:
            axes.plot([x, x], [y - spread, y + spread], color=_GREY, linewidth=1.2, zorder=2.5)
    areas = [diameter**2 for diameter in plot.diameters]
    dots = axes.scatter(
        plot.xs, plot.ys, areas, plot.macs, cmap=LinearSegmentedColormap.from_list("macs", COLOURS),
        vmin=0, vmax=plot.most_macs, edgecolors=plot.edges, linewidths=plot.edge_widths, zorder=3,
    )  # fmt: skip
    halo = [withStroke(linewidth=3, foreground="white")]
    for label in plot.labels(_AREA, 14):
        axes.annotate(
            label.text, (label.x, label.y), (label.offset[0], -label.offset[1]), textcoords="offset points",
            size=14, ha="center", va="center", color=_INK, parse_math=False, path_effects=halo,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.8} if label.led else None,
        )  # fmt: skip
    bar = drawing.colorbar(dots, cax=drawing.add_axes(_share(_BAR)))
    bar.set_label(plot.macs_title, size=13, color=_SOFT)
    bar.ax.tick_params(labelsize=12, color=_GREY, labelcolor=_SOFT)
    bar.outline.set_visible(False)
    return drawing


def _share(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A box in pixels as (left, bottom, width, height) in shares of the figure."""
    left, top, right, bottom = box
    return left / _WIDTH, 1 - bottom / _HEIGHT, (right - left) / _WIDTH, (bottom - top) / _HEIGHT
