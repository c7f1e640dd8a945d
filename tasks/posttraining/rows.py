"""Rows of post-training data: JSON lines from a file or a folder, or a data set of the hub; no code is run.

What a row must hold is for the verb to say (:mod:`pyra.tasks.posttraining.chat`); here every row is an object of JSON
values with a name that errors call it by.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyra.errors import DataError
from pyra.tasks.data.hub import HubId, fetched
from pyra.tasks.language.data import LIMIT_SEED

_LAYOUT = "a .jsonl file, a folder with train.jsonl (and test.jsonl), or owner/name on the hub"
_HELD = ("test", "validation")
"""Splits of the hub that are scored, the first that is there."""


@dataclass(frozen=True)
class Row:
    """One row as it was read, and what errors call it."""

    values: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Rows:
    """What is trained on, and what is held out.

    Attributes:
        name: of the data.
        source: the folder or file, or ``hub:`` and a name there.
        train: at least one row.
        test: at least one row.
        drawn: whether the test rows were drawn from the training rows, as the data has none of its own.
    """

    name: str
    source: str
    train: list[Row]
    test: list[Row]
    drawn: bool = False


def read_rows(data: str, held_out: float = 0.05, limit: int | None = None) -> Rows:
    """Read post-training data.

    Args:
        data: a file, a folder or a hub id.
        held_out: share of the rows that is held out, by a fixed draw, where the data has no test rows.
        limit: use this many rows of each split only, by a fixed draw.

    Raises:
        DataError: for data that is not there, not JSON lines, or has too few rows; the message names file and line.
    """
    name, source, found = _splits(data)
    drawn = "test" not in found
    if drawn:
        found = _divide(found["train"], held_out, data)
    return Rows(name, source, _limited(found["train"], limit), _limited(found["test"], limit), drawn)


def rows_digest(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of rows: their values, in order."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row.values, sort_keys=True, default=str)
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def data_record(rows: Rows) -> dict[str, Any]:
    """Return what a run keeps of its data: size and hash of each split."""
    splits = {"train": rows.train, "test": rows.test}
    return {
        "task": rows.name,
        "source": rows.source,
        "splits": {name: {"examples": len(one), "sha256": rows_digest(one)} for name, one in splits.items()},
    }


def read_lines(path: Path) -> list[Row]:
    """Read a file of JSON lines, each an object.

    Raises:
        DataError: naming the file, and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows: it must have a JSON object a line")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, found a {type(values).__name__}")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = ascii(error.object[error.start])
        raise DataError(f"{where}: {lone} is half of a character: write the other half, too") from None
    return Row(values, where)


def _splits(data: str) -> tuple[str, str, dict[str, list[Row]]]:
    path = Path(data).expanduser()
    if path.is_dir():
        return path.resolve().name, str(path.resolve()), _of_folder(path)
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise DataError(f"--data {data}: rows are read from JSON lines (.jsonl); give {_LAYOUT}")
        return path.stem, str(path.resolve()), {"train": read_lines(path)}
    source = HubId.parse(data)
    if source is None or path.suffix in (".jsonl", ".json"):
        raise DataError(f"--data {data} is not there: give {_LAYOUT}")
    return source.name, f"hub:{source}", _of_hub(source)


def _of_folder(folder: Path) -> dict[str, list[Row]]:
    if not (folder / "train.jsonl").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:3]) or "nothing"
        raise DataError(f"--data {folder} has no train.jsonl (it holds {found}): give {_LAYOUT}")
    names = [name for name in ("train", "test") if (folder / f"{name}.jsonl").is_file()]
    return {name: read_lines(folder / f"{name}.jsonl") for name in names}


def _of_hub(source: HubId) -> dict[str, list[Row]]:
    found = fetched(source)
    if "train" not in found:
        raise DataError(f"{source} of the Hugging Face hub has no split train, only {', '.join(found)}")
    wanted = {"train": "train"} | next(({"test": name} for name in _HELD if name in found), {})
    read = {
        split: [
            # Columns are shared by all rows on the hub: what a row does not have is None there.
            Row({key: value for key, value in row.items() if value is not None}, f"{source}, {name} {number}")
            for number, row in enumerate(found[name])
        ]
        for split, name in wanted.items()
    }
    if empty := [name for split, name in wanted.items() if not read[split]]:
        raise DataError(f"{source} of the Hugging Face hub: its split {empty[0]} holds no rows")
    return read


def _divide(rows: Sequence[Row], share: float, data: str) -> dict[str, list[Row]]:
    if len(rows) < 2:
        raise DataError(f"--data {data} holds one row: two are needed at least, one of them to be scored")
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    held = set(random.Random(LIMIT_SEED).sample(range(len(rows)), count))
    return {
        "train": [row for place, row in enumerate(rows) if place not in held],
        "test": [row for place, row in enumerate(rows) if place in held],
    }


def _limited(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(LIMIT_SEED).sample(range(len(rows)), limit))]
