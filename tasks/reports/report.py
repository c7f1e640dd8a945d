"""From folders of results to one text: a table, what has to be known beside it, and the comparisons asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyra.errors import ConfigError, DataError, did_you_mean
from pyra.tasks.reports.collect import Collection, Found, collect, is_evaluation
from pyra.tasks.reports.comparable import missing_probes, warnings
from pyra.tasks.reports.formats import RENDERERS, Table, clean, markdown_text
from pyra.tasks.reports.front import tokens_notes
from pyra.tasks.reports.groups import Group, group, majority_groups
from pyra.tasks.reports.pivot import dimensions, pivot
from pyra.tasks.reports.summary import SORTS, csv_cell, devices_note, ordered, records, summary

FORMATS = ("plain", "markdown", "csv", "latex", "json")
FILTERS = ("task", "method", "rate", "backbone", "seed", "protocol", "split", "metric")
_NAMED = 5


@dataclass(frozen=True)
class Report:
    """The text, and the notes that the format has no place for."""

    text: str
    notes: list[str] = field(default_factory=list)


def report(
    folders: Sequence[str],
    *,
    style: str = "plain",
    by: str | None = None,
    sort: str = "name",
    where: Sequence[str] = (),
    against: str | None = None,
    evaluations: bool = False,
) -> Report:
    """Read the results below folders and write them as one table.

    Args:
        folders: to look in.
        style: one of :data:`FORMATS`.
        by: ``rows,columns`` for a table of two dimensions.
        sort: one of :data:`SORTS`.
        where: ``name=value`` for each value that is wanted, names of :data:`FILTERS`.
        against: a method that all others are compared with.
        evaluations: count what ``pyra evaluate`` wrote, too.

    Raises:
        DataError: no result, or a folder that is not there.
        ConfigError: everything else that cannot be done as asked.
    """
    for name, value, allowed in (("format", style, FORMATS), ("sort", sort, SORTS)):
        if value not in allowed:
            raise ConfigError(f"--{name} {value!r}{did_you_mean(value, allowed)}: one of {', '.join(allowed)}")
    across = None if by is None else dimensions(by)
    wanted = filters(where)
    collection = collect(folders, is_evaluation if evaluations else None)
    skipped = skipped_note(collection) + _interrupted(collection)
    if not collection.found:
        more = f" ({'; '.join(skipped)})" if skipped else ""
        raise DataError(
            f"no result below {', '.join(map(str, folders))}{more}: make one with `pyra train --output runs/a`"
        )
    found = filtered(collection.found, wanted)
    groups, notes = group(found, by_seed=across is not None and "seed" in across)
    groups = ordered([*majority_groups(groups), *groups], sort)
    tables, extra = [], {}
    if across is None:
        if style not in ("csv", "json"):
            tables.append(summary(groups))
            notes = devices_note(groups) + notes
        data = records(groups)
    else:
        made = pivot(groups, across)
        tables.append(made.table())
        data, notes = made.records(), made.notes + notes
    notes += warnings(groups) + missing_probes(groups) + tokens_notes(groups)
    if against is not None:
        compared = _compared(group(found)[0] if across and "seed" in across else groups, against)
        tables += [compared.table] if compared.table.cells else []
        notes, extra = notes + compared.notes, compared.records
    if across is None and extra:
        data = [
            record | extra.get(_files_of(one), dict.fromkeys(_EXTRA)) for record, one in zip(data, groups, strict=True)
        ]
    return _written(style, tables, data, notes + skipped)


_EXTRA = ("compared_with", "compared_seeds", "difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class _Compared:
    table: Table
    records: dict[tuple[str, ...], dict[str, Any]]
    notes: list[str]


def _files_of(one: Group) -> tuple[str, ...]:
    return tuple(str(member.file) for member in one.members)


def _compared(groups: Sequence[Group], against: str) -> _Compared:
    from pyra.tasks.reports.paired import compare, comparison_record, comparison_table

    made, notes = compare(groups, against)
    by_group = {_files_of(one.ours): comparison_record(one) for one in made}
    if made:
        notes.append(
            f"differences to {against}: same seeds, same images; interval by bootstrap over seeds and images together"
        )
    return _Compared(comparison_table(made, against), by_group, notes)


def _written(style: str, tables: Sequence[Table], data: list[dict[str, Any]], notes: list[str]) -> Report:
    if style == "json":
        text = json.dumps({"rows": data, "notes": notes}, indent=2, ensure_ascii=False, allow_nan=False)
        return Report(text + "\n")
    if style == "csv":
        return Report(_csv(data), [clean(note) for note in notes])
    text = "\n\n".join(RENDERERS[style](table) for table in tables) + "\n"
    if style == "latex":
        return Report("".join(f"% {clean(note)}\n" for note in notes) + text)
    escape, bullet = (markdown_text, "- ") if style == "markdown" else (clean, "")
    return Report(text + ("\n" if notes else "") + "".join(f"{bullet}{escape(note)}\n" for note in notes))


def _csv(data: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(data[0]) if data else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in data)
    return out.getvalue()


def filters(where: Sequence[str]) -> dict[str, set[str]]:
    """Read ``name=value`` texts with names of :data:`FILTERS`; raises :class:`ConfigError` for others."""
    wanted: dict[str, set[str]] = {}
    problems = []
    for text in where:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in FILTERS:
            problems.append(f"{text!r}{did_you_mean(name, FILTERS)}")
            continue
        try:
            wanted.setdefault(name, set()).add(f"{float(value):.2f}" if name == "rate" else value)
        except ValueError:
            problems.append(f"{text!r} (a rate is a number)")
    if problems:
        raise ConfigError(f"--where takes NAME=VALUE with {', '.join(FILTERS)}; got {', '.join(problems)}")
    return wanted


def filtered(found: Sequence[Found], wanted: dict[str, set[str]]) -> list[Found]:
    """Return the runs that have the wanted values; raises :class:`ConfigError` for a value that no run has."""

    def value(one: Found, name: str) -> str:
        return f"{one.row.rate:.2f}" if name == "rate" else str(getattr(one.row, name))

    for name, values in wanted.items():
        there = {value(one, name) for one in found}
        unknown = sorted(values - there)
        if unknown:
            hint = did_you_mean(unknown[0], there)
            listed = ", ".join(sorted(there))
            raise ConfigError(f"--where {name}={unknown[0]}: no such run{hint}; there are {listed}")
        found = [one for one in found if value(one, name) in values]
    return list(found)


def _interrupted(collection: Collection) -> list[str]:
    left = collection.interrupted
    if not left:
        return []
    more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    listed = ", ".join(map(str, left[:_NAMED]))
    return [f"interrupted, and no row: {listed}{more}; the same training with --resume goes on"]


def skipped_note(collection: Collection) -> list[str]:
    """Return the line that names files which hold no result, if there are any."""
    if not collection.skipped:
        return []
    listed = "; ".join(f"{file} ({reason})" for file, reason in collection.skipped[:_NAMED])
    more = f"; and {len(collection.skipped) - _NAMED} more" if len(collection.skipped) > _NAMED else ""
    count = len(collection.skipped)
    return [f"{count} {'file is no result' if count == 1 else 'files are no results'}: {listed}{more}"]
