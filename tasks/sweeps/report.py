"""The report of a folder of runs: ``report.html``, ``front.png`` and ``report.md``, made again at every call."""

from __future__ import annotations

import io
import warnings as python_warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pyra.errors import DataError
from pyra.files import atomic_path, write_text
from pyra.tasks.reports.collect import Collection, collect, is_rate
from pyra.tasks.reports.comparable import warnings
from pyra.tasks.reports.formats import Table, markdown, markdown_text
from pyra.tasks.reports.groups import differences, group, majority_groups
from pyra.tasks.reports.layout import Plot
from pyra.tasks.reports.png import figure
from pyra.tasks.reports.report import skipped_note
from pyra.tasks.reports.table import value_text
from pyra.tasks.sweeps.commands import commands
from pyra.tasks.sweeps.failures import FAILURES, Failure, read_failures
from pyra.tasks.sweeps.page import sweep_page
from pyra.tasks.sweeps.pictures import existing_pictures, make_pictures
from pyra.tasks.sweeps.points import Point, best_first, columns, device_notes, point

PAGE, CHART, TEXT = "report.html", "front.png", "report.md"
_TABLED = 1000  # rows of the Markdown file


def write_report(folder: str | Path, *, pictures: bool = False) -> Path:
    """Report all finished runs below a folder, and the runs that failed; returns the page.

    Written atomically into the folder: ``report.html`` (one file, no network), ``front.png`` and ``report.md``. Runs
    that differ in their seed only are one point.

    Args:
        folder: with runs at any depth, and perhaps ``failures/*.json``; pictures in ``pictures/*.png`` are shown.
        pictures: draw what merged in a test image at a few rates first, which loads models.

    Raises:
        DataError: no such folder, or neither a finished nor a failed run in it.
    """
    folder = Path(folder).expanduser()
    collection = collect([folder], is_rate)
    failures = read_failures(folder)
    if not collection.found and not failures:
        more = "; ".join(["", *skipped_note(collection)])
        raise DataError(f"no finished run below {folder}{more}: make one with `pyra train --output {folder / 'a'}`")
    points, notes = gathered(collection)
    title = f"Sweep of {', '.join(dict.fromkeys(one.row.task for one in points)) or folder.name}"
    chart = _chart(points, title) if points else None
    shown = make_pictures(points, folder) if pictures else existing_pictures(folder)
    text = sweep_page(
        points, failures, title=title, summary=_summary(points, failures), notes=notes, chart=chart, pictures=shown
    )
    if chart is not None:
        with atomic_path(folder / CHART) as temporary:
            temporary.write_bytes(chart)
    write_text(folder / TEXT, _markdown(points, failures, title, notes))
    write_text(folder / PAGE, text)
    return folder / PAGE


def gathered(collection: Collection) -> tuple[list[Point], list[str]]:
    """Return the points of what was found, the best first, and what the reader has to know."""
    groups, notes = group(collection.found)
    points = best_first([point(one, told) for one, told in zip(groups, differences(groups), strict=True)])
    majority = [
        f"always answering the most frequent class of {one.row.task} scores {value_text(one.row.metric, one.mean)}"
        for one in majority_groups(groups)
    ]
    return points, device_notes(points) + majority + warnings(groups) + notes + skipped_note(collection)


def _summary(points: Sequence[Point], failures: Sequence[Failure]) -> str:
    runs = len({member.file.parent for one in points for member in one.group.members})
    text = f"{_count(runs, 'finished run')} in {_count(len(points), 'point')} (seeds together)"
    return text + (f", {_count(len(failures), 'failed run')} (below)" if failures else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _chart(points: Sequence[Point], title: str) -> bytes:
    """Draw the points of the task that has most of them."""
    most = Counter(one.context for one in points).most_common(1)[0][0]
    drawn = [one for one in points if one.context == most]
    names, spreads = [one.name for one in drawn], [one.group.deviation for one in drawn]
    out = io.BytesIO()
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("ignore", message="Glyph .* missing")  # such a letter is drawn as a box
        plot = Plot([one.mean_row for one in drawn], names, spreads)
        drawing = figure(plot, title if len(drawn) == len(points) else f"Sweep of {most[0]}")
        drawing.savefig(out, format="png", dpi=144)
    return out.getvalue()


def _markdown(points: Sequence[Point], failures: Sequence[Failure], title: str, notes: Sequence[str]) -> str:
    parts = [f"# {markdown_text(title)}", _summary(points, failures)]
    if points:
        made = columns(points[:_TABLED])
        lines = [list(line) for line in zip(*(one.cells for one in made), strict=True)]
        parts += [f"![The front]({CHART})", markdown(Table([c.header for c in made], lines, sum(c.left for c in made)))]
        if len(points) > _TABLED:
            parts.append(f"{len(points) - _TABLED:,} more points stand in {PAGE}.")
        first = commands(points[0].row.unit, points[0].run, points[0].asked_rate)
        shell = [one.text for one in first if one.language == "sh"]
        parts.append("To go on with a point, here the first one:\n\n```sh\n" + "\n".join(shell) + "\n```")
    if failures:
        cells = [[one.run, one.error, one.options, one.when] for one in failures]
        parts += [f"## Failed runs ({FAILURES}/)", markdown(Table(["run", "error", "options", "when"], cells, 4))]
    parts.append("\n".join(f"- {markdown_text(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"
