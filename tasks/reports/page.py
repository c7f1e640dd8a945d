"""The plot and its table as one HTML page (``page.html`` filled in; the drawing library is inside it)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pyra.tasks.reports.layout import COLOURS, FRONT, OTHERS, Plot
from pyra.tasks.reports.table import results_table, table_columns
from pyra.tasks.results import RunResult

# Labels are placed for these widths; the script of the page shows the widest that fits the reader's window.
_WIDTHS = (288, 320, 343, 380, 440, 520, 640, 780, 920, 1060)
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 68, 16, 56  # around the axes; the colour bar lies above them
_FONT = 13


def page(plot: Plot, rows: Sequence[RunResult], title: str) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs

    data = {"traces": _traces(plot, rows), "layout": _layout(plot), "steps": [step(plot, w) for w in _WIDTHS]}
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        table=results_table(rows, "html"),
        devices=escape(_devices(rows)),
        plotly=get_plotlyjs(),
        data=script_json(data),
        style=base_style(),
    )


def base_style() -> str:
    """Return the style that all pages of results share, light and dark."""
    return Path(__file__).with_name("base.css").read_text(encoding="utf-8").rstrip()


def script_json(data: Any) -> str:
    """Return JSON that can stand inside a script of a page: no text in it ends the script."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def step(plot: Plot, width: int) -> dict[str, Any]:
    """Return size and labels of the plot at one width, as high as its labels need to stay near their points."""
    for height in range(450 if width < 600 else 550, 1300, 100):
        labels = plot.labels(label_area(width, height), _FONT)
        if len(labels) == len(plot.labelled) and all(label.distance < 70 for label in labels):
            break
    annotations = [
        {
            "x": label.x, "y": label.y, "text": escape(label.text), "font": {"size": _FONT},
            "ax": round(label.offset[0], 1), "ay": round(label.offset[1], 1), "borderpad": 0,
            "arrowhead": 0, "arrowwidth": 1, "arrowcolor": OTHERS if label.led else "rgba(0,0,0,0)",
        }
        for label in labels
    ]  # fmt: skip
    return {"width": width, "height": height, "annotations": annotations}


def label_area(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the box of the axes in a plot of this size."""
    return _LEFT, _TOP, width - _RIGHT, height - _BOTTOM


def _traces(plot: Plot, rows: Sequence[RunResult]) -> list[dict[str, Any]]:
    xs, ys = plot.line
    bar = {
        "title": {"text": plot.macs_title, "side": "right"}, "orientation": "h", "thickness": 10, "len": 1,
        "y": 1, "yanchor": "bottom", "outlinewidth": 0,
    }  # fmt: skip
    marker = {
        "size": plot.diameters, "opacity": 1, "line": {"width": 2, "color": plot.edges},
        "color": plot.macs, "cmin": 0, "cmax": plot.most_macs, "showscale": True, "colorbar": bar,
        "colorscale": [[index / (len(COLOURS) - 1), colour] for index, colour in enumerate(COLOURS)],
    }  # fmt: skip
    columns = table_columns(rows)
    hover = ["<br>".join(f"{name}: {escape(cells[i])}" for name, cells in columns.items()) for i in range(len(rows))]
    return [
        {"mode": "lines", "x": xs, "y": ys, "hoverinfo": "skip", "line": {"color": FRONT, "width": 2}},
        {"mode": "markers", "x": plot.xs, "y": plot.ys, "marker": marker, "cliponaxis": False,
         "text": hover, "hovertemplate": "%{text}<extra></extra>"},
    ]  # fmt: skip


def _layout(plot: Plot) -> dict[str, Any]:
    axis = {"zeroline": False, "fixedrange": True}
    return {
        "font": {"family": "system-ui, sans-serif", "size": _FONT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
        "margin": {"l": _LEFT, "t": _TOP, "r": _RIGHT, "b": _BOTTOM},
        "xaxis": axis | {"title": {"text": plot.x_title, "standoff": 8}, "range": plot.x_range},
        "yaxis": axis | {"title": {"text": plot.y_title, "standoff": 4}, "range": plot.y_range},
    }


def _devices(rows: Sequence[RunResult]) -> str:
    devices = sorted({str(row.environment["device"]) for row in rows if row.environment.get("device")})
    return f"Measured on {', '.join(devices)}." if devices else ""
