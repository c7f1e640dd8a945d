"""Labelled images as rows, from a parquet file or a folder of images, before anything is decoded.

Labels are class *names* here, so files that number their classes differently can be put together. Everything stays
in memory: no cache folder is read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pyra.errors import DataError

LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
"""Names under which a label column is found when no column is typed as ClassLabel."""

IMAGE = datasets.Image(decode=False)
"""How images are stored: bytes or a path, not decoded."""


@dataclass(frozen=True)
class Rows:
    """Labelled images of one file or folder.

    ``images`` holds ``{"bytes", "path"}`` structs, ``labels`` a class name an image, ``sources`` what errors call each
    image, and ``classes`` the class names in their order.
    """

    images: pa.ChunkedArray
    labels: list[str]
    sources: list[str]
    classes: tuple[str, ...]


def read_parquet(path: Path) -> Rows:
    """Read the image and the label column of a parquet file; a label is a ClassLabel, an integer or a string.

    Raises:
        DataError: not a parquet file, no such columns, rows without a label, or images outside the file's folder.
    """
    try:
        schema = pq.read_schema(path)
        features = _features(schema, path)
        image, label = _image_column(schema, features, path), _label_column(schema, features, path)
        table = pq.read_table(path, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    images = pa.chunked_array([IMAGE.cast_storage(chunk) for chunk in table[image].chunks], type=IMAGE.pa_type)
    images = _beside(images, path)
    labels, classes = _label_names(table[label], features[label], path)
    names = [Path(entry).name if entry else "" for entry in _field(images, "path")]
    sources = [f"{path.name} row {row}" + (f" ({name})" if name else "") for row, name in enumerate(names)]
    return Rows(images, labels, sources, classes)


def read_image_folder(folder: Path) -> Rows:
    """Read ``folder/class/**/image`` files; the class is the first-level folder, files of other kinds are ignored.

    Raises:
        DataError: a class folder without images, or no class folder with images directly inside: the folder is then
            most likely one level too high.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = {
        entry: sorted(p for p in entry.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
        for entry in class_folders(folder)
    }
    empty = [entry.name for entry, images in found.items() if not images]
    if empty and len(empty) < len(found):
        raise DataError(
            f"{folder}: no readable images in the class folder{'s' * (len(empty) > 1)} {_shorten(empty)}; "
            "add some or remove it"
        )
    if found and not empty and not any(image.parent == entry for entry, images in found.items() for image in images):
        example = next(iter(found))
        raise DataError(
            f"{folder}: all images lie deeper than in class folders (such as {found[example][0].parent}); "
            f"give the folder above the classes, such as {example}"
        )
    paths = [image for images in found.values() for image in images]
    labels = [path.relative_to(folder).parts[0] for path in paths]
    sources = [str(path) for path in paths]
    storage = pa.array([{"bytes": None, "path": source} for source in sources], type=IMAGE.pa_type)
    return Rows(pa.chunked_array([storage]), labels, sources, tuple(sorted(set(labels))))


def read_image_list(file: Path, classes: int) -> Rows:
    """Read a list of images beside it, ``path label`` in each line, with labels from 0 on.

    Raises:
        DataError: with the first lines that name no image, an image outside the list's folder, or no class.
    """
    home = file.parent.resolve()
    images, labels, problems = [], [], []
    listed: dict[Path, set[str]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        path = home / name
        if not name or not label.isdecimal() or int(label) >= classes:
            problems.append(f"line {number}: {line.strip()!r} is no path with a label from 0 to {classes - 1}")
            continue
        if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"line {number}: {name} lies outside {home}")
            continue
        if path.parent not in listed:  # one look a folder: splits may have tens of thousands of images
            listed[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in listed[path.parent]:
            problems.append(f"line {number}: {name} is not there")
        images.append({"bytes": None, "path": str(path)})
        labels.append(str(int(label)))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{file}: {'; '.join(problems[:3])}{more}")
    if not labels:
        raise DataError(f"{file} lists no image")
    sources = [image["path"] or "" for image in images]
    names = tuple(str(label) for label in range(classes))
    return Rows(pa.chunked_array([pa.array(images, type=IMAGE.pa_type)]), labels, sources, names)


def class_folders(folder: Path) -> list[Path]:
    """Return the folders directly inside ``folder`` in order of name, hidden ones left out."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def to_dataset(parts: Sequence[Rows], classes: Sequence[str]) -> datasets.Dataset:
    """Put ``parts`` together as columns `image` (not decoded), `label` (ClassLabel over ``classes``) and `source`.

    Raises:
        DataError: a label that is not among ``classes``.
    """
    index = {name: i for i, name in enumerate(classes)}
    unknown = {
        label: part.sources[row] for part in parts for row, label in enumerate(part.labels) if label not in index
    }
    if unknown:
        listed = ", ".join(f"{label!r} ({source})" for label, source in list(unknown.items())[:5])
        raise DataError(
            f"{len(unknown)} labels are not in the training split: {listed}; its classes are {_shorten(classes)}"
        )
    table = pa.table(
        {
            "image": pa.chunked_array([c for part in parts for c in part.images.chunks], type=IMAGE.pa_type),
            "label": pa.array([index[label] for part in parts for label in part.labels], type=pa.int64()),
            "source": pa.array([source for part in parts for source in part.sources], type=pa.string()),
        }
    )
    features = datasets.Features(
        {"image": IMAGE, "label": datasets.ClassLabel(names=list(classes)), "source": datasets.Value("string")}
    )
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _features(schema: pa.Schema, path: Path) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # the library parses JSON somebody wrote into the file, and raises what comes up
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: its description of the columns ('huggingface' metadata) is broken: {reason}"
        ) from None


def _beside(images: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """Resolve images that are stored as paths: relative to the parquet file, and never outside its folder."""
    home = path.parent.resolve()
    rows = images.to_pylist()
    if all(row is None or row["bytes"] is not None or row["path"] is None for row in rows):
        return images
    for number, row in enumerate(rows):
        if row is not None and row["bytes"] is None and row["path"] is not None:
            try:
                file = (home / row["path"]).resolve()
            except (ValueError, OSError, RuntimeError) as error:
                raise DataError(f"{path} row {number}: {row['path']!r} is no path ({error})") from None
            if not file.is_relative_to(home):
                raise DataError(f"{path} row {number} points to {row['path']}, outside {home}: store the images in it")
            row["path"] = str(file)
    return pa.chunked_array([pa.array(rows, type=IMAGE.pa_type)])


def _image_column(schema: pa.Schema, features: datasets.Features, path: Path) -> str:
    for field in schema:
        struct = pa.types.is_struct(field.type) and {"bytes", "path"} <= {sub.name for sub in field.type}
        if struct or isinstance(features[field.name], datasets.Image):
            return str(field.name)
    raise DataError(
        f"{path} has no image column (a struct of bytes and path, as the datasets library writes it); "
        f"its columns are {_shorten(schema.names)}"
    )


def _label_column(schema: pa.Schema, features: datasets.Features, path: Path) -> str:
    typed = [name for name in schema.names if isinstance(features[name], datasets.ClassLabel)]
    named = [name for name in LABEL_COLUMNS if name in schema.names]
    if not typed and not named:
        raise DataError(
            f"{path} has no label column (a ClassLabel, or one named {', '.join(LABEL_COLUMNS)}); "
            f"its columns are {_shorten(schema.names)}"
        )
    return str((typed or named)[0])


def _label_names(column: pa.ChunkedArray, feature: object, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the class name of every row, and all class names in order."""
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


def _field(images: pa.ChunkedArray, name: str) -> list[str | None]:
    return [value for chunk in images.chunks for value in chunk.field(name).to_pylist()]


def _shorten(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
