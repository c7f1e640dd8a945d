"""Rows of a language task from files (tsv, csv, JSON lines, parquet) or from the hub: texts by column, no code run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pyra.errors import DataError, did_you_mean
from pyra.tasks.data.hub import HubError, HubId, fetched
from pyra.tasks.language.cards import TextCard

_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One row as it was read: the text of each column, and what errors call it."""

    values: dict[str, str]
    source: str


def read_records(card: TextCard, root: Path | None, flag: str = "--root") -> dict[str, list[Record]]:
    """Read every split of a task.

    Args:
        card: of the task.
        root: folder the card's files are below; None takes the hub.
        flag: that named it, for errors.

    Raises:
        DataError: for a file that is missing or broken, columns that are missing, or a hub that cannot be reached (the
            layout of the files is told).
    """
    if root is None:
        return _from_hub(card)
    if not card.files:
        raise DataError(f"task {card.name} names no files, only {card.hub} on the hub: leave {flag} out")
    folder = root / card.folder
    missing = [file for file in card.files.values() if not (folder / file).is_file()]
    if missing:
        hub = f"; without {flag} it is fetched from {card.hub} on the hub" if card.hub else ""
        there = f"{folder} is not there" if not folder.is_dir() else f"{folder} has no {', '.join(missing)}"
        raise DataError(f"{there}: task {card.name} is read from {card.layout} below {flag}{hub}")
    return {split: read_file(folder / file, card.columns) for split, file in card.files.items()}


def read_file(path: Path, columns: Sequence[str]) -> list[Record]:
    """Read one file; only ``columns`` are kept, numbers become text.

    Raises:
        DataError: for a file that cannot be read, or columns that are not there; the message names file and line.
    """
    try:
        rows = list(_rows(path, columns))
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path} holds no rows")
    return [Record(_texts(row, columns, where), where) for row, where in rows]


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file is there whose first row has ``columns``."""
    try:
        row, where = next(_rows(path, columns))
        _texts(row, columns, where)
    except (StopIteration, OSError, UnicodeDecodeError, csv.Error, pa.ArrowException, DataError):
        return False
    return True


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    return readers[path.suffix](path, columns)


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Tabs separate, nothing is quoted: quotation marks belong to the text."""
    lines = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="\n")
    cells = (line.rstrip("\n").removesuffix("\r").split("\t") for line in lines)
    yield from _named(path, cells, columns)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _named(path, csv.reader(file, strict=True), columns)


def _named(path: Path, rows: Iterable[list[str]], columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    names: list[str] = []
    for number, cells in enumerate(rows, 1):
        if not cells or cells == [""]:
            continue
        if not names:
            has_header = set(columns) & set(cells)
            names = cells if has_header else list(columns)
            if has_header:
                _refuse_missing(columns, cells, str(path))
                continue
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns, expected {len(names)} ({', '.join(names[:_SHOWN])}); "
                "a first line of names is needed where a file has other columns than these"
            )
        yield dict(zip(names, cells, strict=True)), f"{path}, line {number}"


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise DataError(f"{where}: expected an object with {', '.join(columns)}, found a {_kind(value)}")
            yield value, where


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    found = pq.read_schema(path).names
    _refuse_missing(columns, found, str(path))
    for number, row in enumerate(pq.read_table(path, columns=list(columns)).to_pylist(), 1):
        yield row, f"{path}, row {number}"


def _from_hub(card: TextCard) -> dict[str, list[Record]]:
    if not card.hub:
        raise DataError(f"task {card.name} does not bring its data: give --root FOLDER, which holds {card.layout}")
    source = HubId(card.hub, card.hub_config or None)
    try:
        found = fetched(source)
    except HubError as error:
        local = f"; with --root FOLDER it is read from {card.layout} there" if card.files else ""
        raise DataError(f"{error}{local}") from None
    wanted = {split: card.hub_splits.get(split, split) for split in card.files or card.splits or ("train", "test")}
    missing = [name for name in wanted.values() if name not in found]
    if missing:
        raise DataError(f"{source} of the Hugging Face hub has no split {', '.join(missing)}, only {', '.join(found)}")
    return {split: _of_rows(found[name], card.columns, f"{source}, {name}") for split, name in wanted.items()}


def _of_rows(rows: datasets.Dataset, columns: Sequence[str], where: str) -> list[Record]:
    _refuse_missing(columns, rows.column_names, where)
    rows = rows.select_columns(list(columns))
    places = (f"{where} {number}" for number in range(len(rows)))
    return [Record(_texts(row, columns, place), place) for row, place in zip(rows, places, strict=True)]


def _texts(row: dict[str, Any], columns: Sequence[str], where: str) -> dict[str, str]:
    _refuse_missing(columns, list(row), where)
    wrong = [name for name in columns if not isinstance(row[name], (str, int, float)) or isinstance(row[name], bool)]
    if wrong:
        raise DataError(f"{where}: {wrong[0]} is a {_kind(row[wrong[0]])}, expected text or a number")
    return {name: str(row[name]) for name in columns}


def _refuse_missing(columns: Sequence[str], found: Sequence[str], where: str) -> None:
    missing = [f"{name}{did_you_mean(name, found)}" for name in columns if name not in found]
    if missing:
        have = ", ".join(map(str, found[:_SHOWN]))
        raise DataError(f"{where}: no column {', '.join(missing)}; it has {have or 'none'}")


def _kind(value: object) -> str:
    return {type(None): "null", dict: "nested object", list: "list", bool: "truth value"}.get(
        type(value), type(value).__name__
    )
