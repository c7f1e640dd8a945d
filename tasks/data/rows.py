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
from pyra.tasks.data.columns import FOUND, Columns, chosen_columns, features_of, label_names, shorten

IMAGE = datasets.Image(decode=False)
"""How images are stored: bytes or a path, not decoded."""


class ListError(DataError):
    """A list of images with lines that are wrong; ``labels`` are those of all lines that have one."""

    def __init__(self, message: str, labels: Iterable[str]) -> None:
        super().__init__(message)
        self.labels = frozenset(labels)


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


def read_parquet(path: Path, columns: Columns = FOUND) -> Rows:
    """Read the image and the label column of a parquet file; a label is a ClassLabel, an integer or a string.

    Raises:
        DataError: not a parquet file, no such columns, rows without a label, or images outside the file's folder.
    """
    try:
        schema = pq.read_schema(path)
        features = features_of(schema, path)
        chosen = chosen_columns(schema, features, path, columns)
        table = pq.read_table(path, columns=list(chosen))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    return _rows(table, features, path, chosen, [path.parent.resolve()])


def read_table(
    table: pa.Table, features: datasets.Features, where: str, columns: Columns, homes: Sequence[Path]
) -> Rows:
    """Read the image and the label column of a table.

    Args:
        table: any columns.
        features: their types.
        where: what errors call the table.
        columns: which to read.
        homes: folders in which images that are stored as paths may lie; a relative path starts at the first.

    Raises:
        DataError: no such columns, rows without a label, or images outside ``homes``.
    """
    return _rows(table, features, where, chosen_columns(table.schema, features, where, columns), homes)


def _rows(
    table: pa.Table, features: datasets.Features, where: Path | str, chosen: tuple[str, str], homes: Sequence[Path]
) -> Rows:
    image, label = chosen
    images = pa.chunked_array([IMAGE.cast_storage(chunk) for chunk in table[image].chunks], type=IMAGE.pa_type)
    images = _inside(images, where, homes)
    labels, classes = label_names(table[label], features[label], where)
    names = [Path(entry).name if entry else "" for entry in _field(images, "path")]
    called = where.name if isinstance(where, Path) else where
    sources = [f"{called} row {row}" + (f" ({name})" if name else "") for row, name in enumerate(names)]
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
            f"{folder}: no readable images in the class folder{'s' * (len(empty) > 1)} {shorten(empty)}; "
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
    odd = [source for source in sources if any("\udc80" <= letter <= "\udcff" for letter in source)]
    if odd:
        raise DataError(f"{folder}: the name {odd[0]!a} is not UTF-8: rename the file")
    storage = pa.array([{"bytes": None, "path": source} for source in sources], type=IMAGE.pa_type)
    return Rows(pa.chunked_array([storage]), labels, sources, tuple(sorted(set(labels))))


def read_image_list(file: Path, classes: int) -> Rows:
    """Read a list of images beside it, ``path label`` in each line, with labels from 0 on.

    Raises:
        ListError: with the first lines that name no image, an image outside the list's folder, or no class.
        DataError: for a file that cannot be read or is empty.
    """
    home = file.parent.resolve()
    images, labels, problems = [], [], []
    listed: dict[Path, set[str]] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
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
        labels.append(str(int(label)))
        if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"line {number}: {name} lies outside {home}")
            continue
        if path.parent not in listed:  # one look a folder: splits may have tens of thousands of images
            listed[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in listed[path.parent]:
            problems.append(f"line {number}: {name} is not there")
        images.append({"bytes": None, "path": str(path)})
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ListError(f"{file}: {'; '.join(problems[:3])}{more}", labels)
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
            f"{len(unknown)} labels are not in the training split: {listed}; its classes are {shorten(classes)}"
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


def _inside(images: pa.ChunkedArray, where: Path | str, homes: Sequence[Path]) -> pa.ChunkedArray:
    """Resolve images that are stored as paths: relative to the first of ``homes``, and never outside all of them."""
    if all(chunk.field("bytes").null_count == 0 for chunk in images.chunks):
        return images
    rows = images.to_pylist()
    for number, row in enumerate(rows):
        if row is not None and row["bytes"] is None and row["path"] is not None:
            try:
                file = (homes[0] / row["path"]).resolve()
            except (ValueError, OSError, RuntimeError) as error:
                raise DataError(f"{where} row {number}: {row['path']!r} is no path ({error})") from None
            if not any(file.is_relative_to(home) for home in homes):
                raise DataError(
                    f"{where} row {number} points to {row['path']}, outside {homes[0]}: store the images in it"
                )
            row["path"] = str(file)
    return pa.chunked_array([pa.array(rows, type=IMAGE.pa_type)])


def _field(images: pa.ChunkedArray, name: str) -> list[str | None]:
    return [value for chunk in images.chunks for value in chunk.field(name).to_pylist()]
