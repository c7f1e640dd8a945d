"""From a task card to splits: files beside it, lists of images below a root, the hub, or pictures that are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from pyra.errors import DataError
from pyra.tasks.data import sprites
from pyra.tasks.data.cards import TaskCard
from pyra.tasks.data.columns import Columns, shorten
from pyra.tasks.data.draws import stratified
from pyra.tasks.data.folders import Splits, read_splits
from pyra.tasks.data.hub import HubError, HubId, read_hub
from pyra.tasks.data.manifest import FILE as MANIFEST
from pyra.tasks.data.manifest import check_prepared
from pyra.tasks.data.rows import IMAGE, ListError, Rows, read_image_list, to_dataset

TUNING = ("train800", "val200")
PARTS = {"train800": 800, "val200": 200}
DRAW_SEED = 0
_SPRITES_SEED = 1000


class MissingData(DataError):
    """A task that does not bring its data, where none was found; the message says what would serve."""


@dataclass(frozen=True)
class Source:
    """Splits, where they come from, and whether which images are in them is our own draw."""

    splits: Splits
    where: str
    own_draw: bool = False


def load_splits(card: TaskCard, home: Path, root: str | Path | None) -> Source:
    """Read, draw or fetch all splits of a task, at least ``train`` and ``test``.

    VTAB's ``train800val200`` is ``train``; its parts keep their names, and ``val200`` is ``validation``, too.

    Args:
        card: of the task.
        home: folder of the card.
        root: folder that holds the data of tasks that bring none (or drawn ones that were prepared); without one, a
            task that has its data on the hub is fetched.

    Raises:
        MissingData: where the data is not there.
        DataError: where it is not what the card says.
    """
    if card.kind == "sprites":
        if root is not None and (Path(root).expanduser() / card.name / MANIFEST).is_file():
            return listed(card, Path(root).expanduser() / card.name)
        return Source(named(_drawn(card)), "drawn by pyra.tasks.data.sprites", own_draw=True)
    if card.kind == "lists":
        if root is None and card.hub:
            try:
                return from_hub(card)
            except HubError as error:
                raise MissingData(f"{error}; for a local copy give --root FOLDER, which holds {layout(card)}") from None
        return listed(card, _below(card, root))
    splits, _ = read_splits({split: [home / file] for split, file in card.files.items()}, home)
    return Source(splits, "with the package")


def layout(card: TaskCard) -> str:
    """Say what a folder must hold for a task that does not bring its data."""
    return f"{card.folder}/ with train800.txt, val200.txt, test.txt and the images they list, or those as parquet files"


def from_hub(card: TaskCard) -> Source:
    """Fetch the data set that a card names on the hub, and draw the parts of the benchmark from it.

    Raises:
        HubError: where it cannot be fetched.
        DataError: where it is not what the card says.
    """
    source = HubId(card.hub, card.hub_config or None)
    splits, _ = read_hub(source, Columns(card.image_column or None, card.label_column or None))
    return Source(named(in_parts(card, splits, str(source))), f"{source} of the Hugging Face hub", own_draw=True)


def in_parts(card: TaskCard, splits: Splits, where: str) -> dict[str, datasets.Dataset]:
    """Draw ``train800`` and ``val200`` by class with a fixed seed; the test split stays whole.

    The validation images come from the validation split, where there is one that is not the test split, too.

    Raises:
        DataError: where there are too few images, or other classes than the card says.
    """
    check_classes(card, splits, where)
    own = splits.get("validation")
    apart = own is not None and own is not splits["test"] and len(own) >= PARTS["val200"]
    wanted = {name: count for name, count in PARTS.items() if not (apart and name == "val200")}
    try:
        chosen = stratified(splits["train"]["label"][:], wanted, DRAW_SEED)
    except ValueError as error:
        raise DataError(f"{where}: {error} in its training split") from None
    made = {name: splits["train"].select(rows) for name, rows in chosen.items()}
    if own is not None and apart:
        rows = stratified(own["label"][:], {"val200": PARTS["val200"]}, DRAW_SEED)["val200"]
        made["val200"] = own.select(rows)
    return {**made, "test": splits["test"]}


def check_classes(card: TaskCard, splits: Splits, where: str) -> None:
    """Raise :class:`DataError` where splits have another number of classes than the card says."""
    found = len(next(iter(splits.values())).features["label"].names)
    if found != card.classes:
        raise DataError(f"{where} has {found} classes, task {card.name} has {card.classes}")


def _below(card: TaskCard, root: str | Path | None) -> Path:
    if root is None:
        raise MissingData(f"task {card.name} does not bring its data: give --root FOLDER, which holds {layout(card)}")
    folder = Path(root).expanduser() / card.folder
    if not folder.is_dir():
        hub = f"; without --root (and PYRA_DATA) it is fetched from the hub, {card.hub}" if card.hub else ""
        raise MissingData(f"{folder} is not there: --root must hold {layout(card)}{hub}")
    return folder


def listed(card: TaskCard, folder: Path) -> Source:
    """Read a folder in the layout of the benchmark.

    Raises:
        DataError: where files are missing or wrong (all of them), or it was prepared for another version of the task.
    """
    manifest = check_prepared(card, folder)
    try:
        splits = named(_listed(card, folder))
    except DataError as error:
        if manifest is not None and any(not (folder / f"{name}.parquet").is_file() for name in (*TUNING, "test")):
            raise DataError(f"{error}; preparing it was cut off: give the same command again to go on") from None
        raise
    return Source(splits, str(folder), own_draw=manifest is not None and manifest.draw == "own")


def _listed(card: TaskCard, folder: Path) -> dict[str, datasets.Dataset]:
    """Read ``train800``, ``val200``, ``test`` and, where it is there, ``train800val200``."""
    needed = [*TUNING, "test"]
    kinds = [suffix for suffix in (".txt", ".parquet") if (folder / f"{needed[0]}{suffix}").is_file()]
    if not kinds:
        raise DataError(f"{folder} has neither {needed[0]}.txt nor {needed[0]}.parquet")
    files = {name: folder / f"{name}{kinds[0]}" for name in (*needed, "train800val200")}
    missing = [files[name].name for name in needed if not files[name].is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    files = {name: file for name, file in files.items() if file.is_file()}
    if kinds[0] == ".parquet":
        both = files.pop("train800val200", None)
        whole = [files[name] for name in TUNING] if both is None else [both]
        splits, _ = read_splits({"train": whole, **{name: [file] for name, file in files.items()}}, folder)
        check_classes(card, splits, str(folder))
        return dict(splits)
    classes = [str(label) for label in range(card.classes)]
    made, problems, seen = {}, [], set[str]()
    for name, file in files.items():
        try:
            rows = read_image_list(file, card.classes)
            made[name] = to_dataset([rows], classes)
            seen |= set(rows.labels)
        except DataError as error:
            problems.append(str(error))
            seen |= error.labels if isinstance(error, ListError) else set()
    if problems:
        if empty := [label for label in classes if label not in seen]:
            problems.append(f"no list has an image of class {shorten(empty)}")
        raise DataError("; ".join(problems))
    return made


def _drawn(card: TaskCard) -> dict[str, datasets.Dataset]:
    start, made = 0, {}
    classes = tuple(str(label) for label in range(card.classes))
    for name, count in card.splits.items():
        numbers = sprites.draw_split(count, _SPRITES_SEED, start)
        start += count
        storage = pa.array([{"bytes": file, "path": None} for file in sprites.encoded(numbers)], type=IMAGE.pa_type)
        labels = [str(label) for label in sprites.labels(numbers, card.factor)]
        sources = [f"dSprites {number}" for number in numbers]
        made[name] = to_dataset([Rows(pa.chunked_array([storage]), labels, sources, classes)], classes)
    return made


def named(found: Mapping[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Add ``train`` and ``validation`` to the parts of the benchmark."""
    splits = dict(found)
    whole = splits.pop("train800val200", None)
    if "train" not in splits:
        splits["train"] = whole or datasets.concatenate_datasets([splits[name] for name in TUNING])
    splits["validation"] = splits[TUNING[1]]
    return splits
