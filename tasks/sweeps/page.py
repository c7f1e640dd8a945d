"""The report as one HTML page: ``page.html`` filled in, its style, its script, its picture and its data inside.

Texts of numbers are made here once; the script sorts, filters and draws by the numbers beside them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pyra.tasks.reports.front import front_places
from pyra.tasks.reports.page import base_style, script_json
from pyra.tasks.reports.table import metric_name, shown_value
from pyra.tasks.sweeps.commands import PLACE, commands
from pyra.tasks.sweeps.failures import Failure
from pyra.tasks.sweeps.points import Column, Cost, Point, columns, costs

_LARGEST_PICTURE = 4 * 2**20  # bytes


def sweep_page(
    points: Sequence[Point],
    failures: Sequence[Failure],
    *,
    title: str,
    summary: str,
    notes: Sequence[str] = (),
    chart: bytes | None = None,
    pictures: Sequence[Path] = (),
) -> str:
    """Return the page.

    Args:
        points: in the order of the table; without them the page has failures and notes only.
        failures: runs that ended with an error.
        title: of the page.
        summary: a line below it.
        notes: what the reader has to know.
        chart: the PNG that readers without JavaScript see.
        pictures: PNG files of merged tokens; large ones are left out.
    """
    ways = costs(points)
    return _template("page.html").substitute(
        title=escape(title),
        summary=escape(summary),
        style=f"{base_style()}\n{_text('page.css')}",
        chart=_chart(points, chart) if points else "",
        pictures=_gallery(pictures),
        table=_table(columns(points), _front(points, ways)) if points else "",
        failures=_failures(failures),
        notes=_list(notes),
        data=script_json(_data(points, ways)),
        script=_text("page.js") if points else "",
    )


def _data(points: Sequence[Point], ways: Sequence[Cost]) -> dict[str, Any]:
    contexts = list(dict.fromkeys(one.context for one in points))
    methods = sorted({one.row.method for one in points})
    kinds = list(dict.fromkeys((one.row.unit, one.asked_rate) for one in points))
    metrics = []
    for context in contexts:
        row = next(one.row for one in points if one.context == context)
        scale = shown_value(row) / row.value if row.value else 1.0
        metrics.append({"title": metric_name(row.metric), "higher": row.higher_is_better, "scale": scale})
    return {
        "contexts": contexts,
        "methods": methods,
        "metrics": metrics,
        "costs": [{"key": one.key, "title": one.title, "axis": one.axis, "higher": one.higher} for one in ways],
        "place": PLACE,
        "commands": [[[one.does, one.language, one.text] for one in commands(unit, rate=rate)] for unit, rate in kinds],
        "points": [
            [
                contexts.index(one.context),
                methods.index(one.row.method),
                one.row.rate,
                one.group.mean,
                one.group.deviation,
                str(one.run.resolve()),
                kinds.index((one.row.unit, one.asked_rate)),
                *(way.of(one) for way in ways),
            ]
            for one in points
        ],
    }


def _front(points: Sequence[Point], ways: Sequence[Cost]) -> set[int]:
    """Return the places of the points on the front of the first cost that is measured, within their context."""
    way = next(way for way in ways if any(way.of(one) is not None for one in points))
    found: set[int] = set()
    for context in {one.context for one in points}:
        places = [place for place, one in enumerate(points) if one.context == context and way.of(one) is not None]
        front = front_places([_pair(points[place], way) for place in places])
        found |= {places[place] for place in front}
    return found


def _pair(one: Point, way: Cost) -> tuple[float, float]:
    value, cost = one.group.mean, way.of(one) or 0.0
    return cost if way.higher else -cost, value if one.row.higher_is_better else -value


def _chart(points: Sequence[Point], png: bytes | None) -> str:
    contexts = list(dict.fromkeys(one.context for one in points))
    several = len({metric for _, _, metric in contexts}) > 1
    names = [task + f" ({split})" * (split != "test") + f", {metric}" * several for task, split, metric in contexts]
    choices = "".join(f'<option value="{place}">{escape(name)}</option>' for place, name in enumerate(names))
    task = f'<label><span class="field">task</span><select id="task">{choices}</select></label>' * (len(names) > 1)
    image = "" if png is None else base64.b64encode(png).decode()
    return _template("chart.html").substitute(task=task, image=f"data:image/png;base64,{image}")


def _table(made: Sequence[Column], front: set[int]) -> str:
    """Return the table with the key of each column, and a mark at the points of the front."""
    count = len(made[0].cells)
    marks = ["●" if place in front else "" for place in range(count)]
    named = {one.key: one for one in [*made, Column("front", "front", marks, left=True)]}
    shown = [named[key] for key in dict.fromkeys((*_FIRST, *named))]
    heads = "".join(
        f'<th data-key="{one.key}" scope="col"{"" if one.left else _NUMBER}>{escape(one.header)}</th>' for one in shown
    )
    opened = ["<td>" if one.left else f"<td{_NUMBER}>" for one in shown]
    lines = (
        "<tr>"
        + "".join(f"{tag}{escape(one.cells[place])}</td>" for tag, one in zip(opened, shown, strict=True))
        + "</tr>"
        for place in range(count)
    )
    return _template("table.html").substitute(heads=heads, lines="\n".join(lines))


_NUMBER = ' class="number"'
_FIRST = ("method", "front", "rate", "value")  # what a phone shows without scrolling


def _failures(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    lines = "\n".join(
        f'<tr><td>{escape(one.run)}</td><td class="wrap">{escape(one.error)}</td><td class="wrap">{escape(one.options)}'
        f"</td><td>{escape(one.when)}</td></tr>"
        for one in failures
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("run", "error", "options", "when"))
    return (
        f'<h2>Failed runs</h2>\n<div class="rows" tabindex="0" role="region" aria-label="failed runs">\n'
        f'<table id="failures">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>'
    )


def _gallery(pictures: Sequence[Path]) -> str:
    shown = [
        f'<figure><img alt="merged tokens: {escape(file.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(file.read_bytes()).decode()}"><figcaption>{escape(file.stem)}</figcaption></figure>'
        for file in pictures
        if file.stat().st_size <= _LARGEST_PICTURE
    ]
    return f'<section class="gallery"><h2>Merged tokens</h2>\n{"".join(shown)}\n</section>' if shown else ""


def _list(notes: Sequence[str]) -> str:
    return "<h2>Notes</h2>\n<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip()


def _template(name: str) -> Template:
    return Template(_text(name))
