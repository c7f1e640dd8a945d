"""A task as a local folder in the layout of the benchmark, made from whatever source is reachable.

FOLDER/TASK/
train800.parquet, val200.parquet, test.parquet   columns `image` (encoded as in the source) and `label`
pyra_task.json                                   the manifest

Splits appear whole or not at all; what is finished is not made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pyra.errors import DataError, OutputError
from pyra.files import atomic_path
from pyra.tasks.data.cards import TaskCard
from pyra.tasks.data.columns import FOUND, Columns
from pyra.tasks.data.decoding import split_digest, stored_bytes
from pyra.tasks.data.manifest import Manifest, SplitRecord, check_prepared
from pyra.tasks.data.rows import read_parquet, to_dataset
from pyra.tasks.data.sources import TUNING, MissingData, Source, check_classes, in_parts, listed, load_splits
from pyra.tasks.data.task import load_task

SPLITS = (*TUNING, "test")
_BATCH = 256  # images in memory at once, and in a row group


@dataclass(frozen=True)
class Prepared:
    """What was done for a task: where from, with which draw, images of each split, and which were there before."""

    task: str
    source: str = ""
    draw: str = ""
    images: dict[str, int] = field(default_factory=dict)
    there: list[str] = field(default_factory=list)
    error: str | None = None
    missing: bool = False  # no source was reachable


def prepare(
    card: TaskCard,
    home: Path,
    output: Path,
    *,
    source: str | None = None,
    root: str | None = None,
    columns: Columns = FOUND,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Write the local folder of a task.

    Args:
        card: of the task.
        home: folder of the card.
        output: the folder of the task is made in it.
        source: a folder in the layout of the benchmark, or anything that ``--data`` takes; by default what lies below
            ``root``, what can be drawn, or the hub data set of the card, in this order.
        root: folder with the data of tasks that bring none.
        columns: of ``source``.
        advance: called with the images written, and of how many.

    Raises:
        MissingData: where no source is reachable.
        DataError: where it is not what the card says.
        OutputError: where the folder holds something else, or cannot be written.
    """
    if card.kind == "parquet":
        raise DataError(f"task {card.name} is a part of the package: there is nothing to prepare")
    folder = output.expanduser() / (card.folder or card.name)
    given = Path(source).expanduser() if source is not None else None
    if given is not None and given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
        raise OutputError(f"--output {output} lies inside --source {source}: choose a folder outside")
    earlier = _earlier(card, folder)
    found = _found(card, home, source, root, columns)
    if earlier is not None and earlier.source != found.where:
        raise OutputError(
            f"{folder} was prepared from {earlier.source}, not from {found.where}: choose another --output"
        )
    records = dict(earlier.splits) if earlier is not None else {}
    total, done, there = sum(len(found.splits[name]) for name in SPLITS), 0, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            rows, file = found.splits[name], folder / f"{name}.parquet"
            record = SplitRecord(len(rows), split_digest(rows))
            if records.get(name, record) != record:
                raise OutputError(
                    f"{folder}: the {name} split of {found.where} has changed since; remove the folder first"
                )
            if _holds(file, record):
                there.append(name)
            else:
                records[name] = record
                _manifest(card, found, records).write(folder)
                for written in _writing(rows, file):
                    advance(done + written, total)
            done += len(rows)
            advance(done, total)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error}): what is finished stays, the same command goes on"
        ) from None
    images = {name: len(found.splits[name]) for name in SPLITS}
    return Prepared(card.name, found.where, _manifest(card, found, {}).draw, images, there)


def _manifest(card: TaskCard, source: Source, records: dict[str, SplitRecord]) -> Manifest:
    draw = "own" if source.own_draw else "source"
    return Manifest(task=card.name, version=card.version, source=source.where, draw=draw, splits=records)


def _found(card: TaskCard, home: Path, source: str | None, root: str | None, columns: Columns) -> Source:
    if source is None:
        below = root is not None and (Path(root).expanduser() / (card.folder or card.name)).is_dir()
        try:
            return load_splits(card, home, root if below else None)
        except MissingData as error:
            raise MissingData(f"{error}; or --source, with images of the same classes") from None
    folder = Path(source).expanduser()
    if any((folder / f"train800{suffix}").is_file() for suffix in (".txt", ".parquet")):
        return listed(card, folder)
    task = load_task(data=source, columns=columns)
    check_classes(card, task.splits, task.source)
    return Source(in_parts(card, task.splits, task.source), task.source, own_draw=True)


def _earlier(card: TaskCard, folder: Path) -> Manifest | None:
    """Return what an earlier call has left; raises :class:`OutputError` where the folder is somebody's own."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --output")
    manifest = check_prepared(card, folder)
    names = sorted(entry.name for entry in folder.iterdir())
    ours = {f"{name}.parquet" for name in (manifest.splits if manifest is not None else ())}
    foreign = [name for name in names if name in {f"{split}.parquet" for split in SPLITS} - ours]
    if manifest is None:
        foreign = names
    if foreign:
        raise OutputError(
            f"{folder} holds files that are not from pyra tasks prepare ({', '.join(foreign[:3])}): "
            "choose another --output"
        )
    for name in SPLITS:  # what a killed process has left
        for file in folder.glob(f".{name}.parquet.*"):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
    return manifest


def _holds(file: Path, record: SplitRecord) -> bool:
    if not file.is_file():
        return False
    try:
        rows = read_parquet(file)
        return split_digest(to_dataset([rows], rows.classes)) == record.sha256
    except DataError:
        return False


def _writing(rows: datasets.Dataset, file: Path) -> Iterator[int]:
    """Write a split; yields how many images are written."""
    features = datasets.Features({"image": datasets.Image(), "label": rows.features["label"]})
    with atomic_path(file) as temporary, pq.ParquetWriter(temporary, features.arrow_schema) as writer:
        for start in range(0, len(rows), _BATCH):
            chunk = rows.select(range(start, min(start + _BATCH, len(rows))))
            images = []
            for row in chunk:
                encoded = stored_bytes(row)
                if not encoded:
                    raise DataError(f"{row['source']} cannot be read: repair or remove it")
                path = row["image"]["path"]
                images.append({"bytes": encoded, "path": Path(path).name if path else None})
            columns = {"image": images, "label": chunk["label"][:]}
            writer.write_table(pa.table(columns, schema=features.arrow_schema))
            yield start + len(chunk)
