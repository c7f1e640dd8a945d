"""Which columns of a table hold the images and the labels, and what the labels are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from pyra.errors import DataError, did_you_mean

LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "cls")
"""Names under which a label column is found when no column is typed as ClassLabel, or several are."""

IMAGE_COLUMNS = ("image", "img", "picture", "photo")
"""Names that decide where several columns hold images."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; what is not named is found by type, then by name."""

    image: str | None = None
    label: str | None = None


FOUND = Columns()
"""No column is named: all are found."""


def chosen_columns(
    schema: pa.Schema, features: datasets.Features, where: Path | str, columns: Columns
) -> tuple[str, str]:
    """Return the names of the image and the label column.

    Raises:
        DataError: where there is none, or several of which no name says which is meant.
    """
    return _image_column(schema, features, where, columns.image), _label_column(schema, features, where, columns.label)


def features_of(schema: pa.Schema, path: Path) -> datasets.Features:
    """Return the types of all columns; raises :class:`DataError` where the file describes them wrongly."""
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # the library parses JSON somebody wrote into the file, and raises what comes up
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: its description of the columns ('huggingface' metadata) is broken: {reason}"
        ) from None


def _image_column(schema: pa.Schema, features: datasets.Features, where: Path | str, asked: str | None) -> str:
    found = []
    for field in schema:
        struct = pa.types.is_struct(field.type) and {"bytes", "path"} <= {sub.name for sub in field.type}
        if struct or isinstance(features[field.name], datasets.Image):
            found.append(str(field.name))
    if asked is not None:
        return _asked(asked, "image", found, schema, where)
    if not found:
        raise DataError(
            f"{where} has no image column (a struct of bytes and path, as the datasets library writes it); "
            f"its columns are {shorten(schema.names)}"
        )
    return _only(found, "image", IMAGE_COLUMNS, where)


def _label_column(schema: pa.Schema, features: datasets.Features, where: Path | str, asked: str | None) -> str:
    if asked is not None:
        return _asked(asked, "label", schema.names, schema, where)
    typed = [name for name in schema.names if isinstance(features[name], datasets.ClassLabel)]
    named = [name for name in LABEL_COLUMNS if name in schema.names]
    if not typed and not named:
        raise DataError(
            f"{where} has no label column (a ClassLabel, or one named {', '.join(LABEL_COLUMNS)}); "
            f"its columns are {shorten(schema.names)}"
        )
    return _only(typed, "label", LABEL_COLUMNS, where) if typed else named[0]


def _asked(asked: str, kind: str, allowed: Sequence[str], schema: pa.Schema, where: Path | str) -> str:
    if asked in allowed:
        return asked
    known = asked in schema.names
    what = f"is no {kind} column" if known else f"is not among its columns{did_you_mean(asked, schema.names)}"
    raise DataError(f"{where}: --{kind}-column {asked!r} {what}; it could be {shorten(allowed) or 'none of them'}")


def _only(found: Sequence[str], kind: str, names: Sequence[str], where: Path | str) -> str:
    """Return the one column found, or the one among several whose name says what it is."""
    telling = [name for name in names if name in found]
    if len(found) > 1 and not telling:
        raise DataError(f"{where} has the {kind} columns {', '.join(found)}: name one with --{kind}-column {found[0]}")
    return telling[0] if telling else found[0]


def label_names(column: pa.ChunkedArray, feature: object, path: Path | str) -> tuple[list[str], tuple[str, ...]]:
    """Return the class name of every row, and all class names in order; a label is a ClassLabel, an integer or text.

    Raises:
        DataError: for rows without a label, labels of another type, or outside the classes of the column.
    """
    values = column.to_pylist()
    missing = [row for row, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise DataError(f"{path}: {len(missing)} rows have no label, the first is row {missing[0]}")
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        wrong = [row for row, value in enumerate(values) if not 0 <= value < len(names)]
        if wrong:
            row = wrong[0]
            raise DataError(f"{path} row {row}: label {values[row]} is outside the {len(names)} classes of the column")
        return [names[value] for value in values], names
    wrong_type = {type(value).__name__ for value in values if not isinstance(value, int | str)}
    if wrong_type:
        raise DataError(f"{path}: labels are {', '.join(sorted(wrong_type))}; they must be integers or strings")
    return [str(value) for value in values], tuple(str(value) for value in sorted(set(values)))


def shorten(names: Iterable[str], limit: int = 12) -> str:
    """Return names as a list in a sentence, the first ``limit`` of them."""
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
