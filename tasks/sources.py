"""From a task card to splits: parquet files beside it, lists of images below a root, or pictures that are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa

from pyra.errors import DataError
from pyra.tasks import sprites
from pyra.tasks.cards import TaskCard
from pyra.tasks.folders import Splits, read_splits
from pyra.tasks.rows import IMAGE, Rows, read_image_list, to_dataset

TUNING = ("train800", "val200")
_SPRITES_SEED = 1000


def load_splits(card: TaskCard, home: Path, root: str | Path | None) -> Splits:
    """Read or draw all splits of a task, at least ``train`` and ``test``.

    VTAB's ``train800val200`` is ``train``; its parts keep their names, and ``val200`` is ``validation``, too.

    Args:
        card: of the task.
        home: folder of the card.
        root: folder that holds the data of tasks that bring none.

    Raises:
        DataError: where the data is not there, or is not what the card says.
    """
    if card.kind == "sprites":
        return _named(_drawn(card))
    if card.kind == "lists":
        return _named(_listed(card, _below(card, root)))
    splits, _ = read_splits({split: [home / file] for split, file in card.files.items()}, home)
    return splits


def _below(card: TaskCard, root: str | Path | None) -> Path:
    layout = (
        f"{card.folder}/ with train800.txt, val200.txt, test.txt and the images they list, or those as parquet files"
    )
    if root is None:
        raise DataError(f"task {card.name} does not bring its data: give --root FOLDER, which holds {layout}")
    folder = Path(root).expanduser() / card.folder
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: --root must hold {layout}")
    return folder


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
        splits, _ = read_splits({("train" if n == "train800val200" else n): [f] for n, f in files.items()}, folder)
        found = len(splits[needed[0]].features["label"].names)
        if found != card.classes:
            raise DataError(f"{folder} has {found} classes, task {card.name} has {card.classes}")
        return dict(splits)
    classes = [str(label) for label in range(card.classes)]
    return {name: to_dataset([read_image_list(file, card.classes)], classes) for name, file in files.items()}


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


def _named(found: Mapping[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    splits = dict(found)
    whole = splits.pop("train800val200", None)
    if "train" not in splits:
        splits["train"] = whole or datasets.concatenate_datasets([splits[name] for name in TUNING])
    splits["validation"] = splits[TUNING[1]]
    return splits
