"""The layouts a folder of labelled images may have, read into splits.

* Parquet: ``train*.parquet``, ``val*`` / ``validation*`` / ``dev*``, ``test*``, one file or shards
  (``train-00000-of-00002.parquet``), in the folder or in its ``data/``.
* VTAB-1k names: ``train800``, ``val200``, ``train800val200``. The habit of the field is to tune on 800 + 200 images
  and to report a model trained on all 1000, so ``train`` is ``train800val200`` or else both parts together, and the
  parts stay available under their own names.
* Images: ``root/train/class/*.jpg`` beside ``root/test/class/*.jpg``, or ``root/class/*.jpg`` alone.

One parquet file, or images without split folders, are divided 80/20 by class with a fixed seed.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from pyra.errors import DataError
from pyra.tasks.data.columns import FOUND, Columns
from pyra.tasks.data.rows import Rows, class_folders, read_image_folder, read_parquet, to_dataset

TEST_SHARE = 0.2
SPLIT_SEED = 0

_ALIASES = {
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("testing", "test"), "test"),
}
_SPLIT = re.compile(rf"({'|'.join(_ALIASES)})(?![a-z])", re.IGNORECASE)
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")

Splits = Mapping[str, datasets.Dataset]


def read_folder(path: Path, columns: Columns = FOUND) -> tuple[Splits, str]:
    """Read the splits below ``path`` (at least ``train`` and ``test``) and say in a sentence how they were found.

    When there is no test split, ``test`` is the validation split.

    Raises:
        DataError: the path does not exist, holds no known layout, or lacks a training or an evaluation split.
    """
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path} is neither a folder nor a parquet file; give the folder that holds the splits")
        return divide([read_parquet(path, columns)], path)
    if not path.is_dir():
        above = path.parent
        hint = f"{above} exists" if above.is_dir() else f"{above} does not exist either"
        raise DataError(f"{path} does not exist ({hint}); give a folder of parquet files or of images by class")
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    return read_splits(_parquet_files(files, path), path, columns) if files else _read_images(path)


def read_splits(files: Mapping[str, Sequence[Path]], where: Path, columns: Columns = FOUND) -> tuple[Splits, str]:
    """Read named splits from parquet files; the class order is that of the training files.

    Raises:
        DataError: with what is wrong with every file.
    """
    read: dict[Path, Rows] = {}
    problems = []
    for file in dict.fromkeys(file for parts in files.values() for file in parts):
        try:
            read[file] = read_parquet(file, columns)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return finish({split: [read[file] for file in parts] for split, parts in files.items()}, where)


def finish(parts: Mapping[str, Sequence[Rows]], where: Path | str) -> tuple[Splits, str]:
    """Number the labels by the training split's classes and settle which split is the test split."""
    if "train" not in parts:
        raise DataError(
            f"{where} has no training split (found {', '.join(parts) or 'nothing'}): add train*.parquet or train/"
        )
    evaluation = next((split for split in ("test", "validation") if split in parts), None)
    if evaluation is None:
        raise DataError(f"{where} has no evaluation split: add test*.parquet or test/ (validation works too)")
    for split, sources in parts.items():
        if not any(rows.labels for rows in sources):
            raise DataError(f"{where}: split {split} is empty")
    classes = list(dict.fromkeys(name for rows in parts["train"] for name in rows.classes))
    splits = {split: to_dataset(rows, classes) for split, rows in parts.items()}
    splits["test"] = splits[evaluation]
    note = "" if evaluation == "test" else "; there is no test split, so the validation split is the test split"
    return splits, f"splits of {where}: {', '.join(parts)}{note}"


def _parquet_files(files: Sequence[Path], where: Path) -> dict[str, list[Path]]:
    """Sort ``files`` into splits by their names."""
    stems = {file.stem.lower(): file for file in files}
    groups: dict[str, list[Path]] = defaultdict(list)
    vtab = [stems[stem] for stem in ("train800", "val200") if stem in stems]
    if "train800val200" in stems or len(vtab) == 2:
        groups["train"] = [stems["train800val200"]] if "train800val200" in stems else list(vtab)
        groups |= {file.stem.lower(): [file] for file in vtab}
        files = [file for file in files if split_of(file.stem) == "test"]
    for file in files:
        if split := split_of(file.stem):
            groups[split].append(file)
    if len(vtab) == 2 and "test" not in groups:  # nothing to report on: tune on 800, look at 200
        return {"train": [stems["train800"]], "validation": [stems["val200"]]}
    for parts in groups.values():
        _check_shards(parts, where)
    for split, parts in groups.items():
        if len(parts) > 1 and parts != vtab and not all(_SHARD.search(part.stem) for part in parts):
            names = ", ".join(part.name for part in parts)
            raise DataError(
                f"{where}: {names} could each be the {split} split; keep one, or name shards {split}-00000-of-00002"
            )
    if not groups:
        raise DataError(
            f"{where} has no file named train*.parquet, val*.parquet or test*.parquet, "
            f"only {', '.join(file.name for file in files[:8])}"
        )
    return dict(groups)


def _check_shards(parts: Sequence[Path], where: Path) -> None:
    """Raise :class:`DataError` where shards of a split are missing."""
    for part in parts:
        if match := _SHARD.search(part.stem):
            stem, width, count = part.stem[: match.start()], len(match[1]), int(match[2])
            names = {f"{stem}-{number:0{width}d}-of-{match[2]}" for number in range(count)}
            missing = sorted(names - {other.stem for other in parts})
            if missing:
                raise DataError(
                    f"{where}: {len(missing)} of {count} shards are missing, the first is {missing[0]}.parquet"
                )


def _read_images(path: Path) -> tuple[Splits, str]:
    folders = class_folders(path)
    named = {folder: _ALIASES[folder.name.lower()] for folder in folders if folder.name.lower() in _ALIASES}
    if any(split == "train" for split in named.values()):
        return finish({split: [_some_images(folder)] for folder, split in named.items()}, path)
    if folders and len(named) == len(folders):
        raise DataError(f"{path} has {', '.join(f.name for f in folders)} but no training split: add a folder train/")
    return divide([_some_images(path)], path)


def _some_images(folder: Path) -> Rows:
    rows = read_image_folder(folder)
    if not rows.labels:
        raise DataError(
            f"{folder} is empty: no parquet files and no images in class folders; "
            "expected train*.parquet and test*.parquet, or one folder of images a class"
        )
    return rows


def divide(parts: Sequence[Rows], where: Path | str) -> tuple[Splits, str]:
    """Divide ``parts`` into train and test, class by class, the same way every time."""
    everything = to_dataset(parts, parts[0].classes)
    by_class: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(everything["label"][:]):
        by_class[label].append(row)
    shuffle = random.Random(SPLIT_SEED)
    test: list[int] = []
    for _, rows in sorted(by_class.items()):
        shuffle.shuffle(rows)
        if len(rows) > 1:  # the only image of a class is for training
            test += rows[: max(1, round(TEST_SHARE * len(rows)))]
    if not test:
        raise DataError(
            f"{where} has too few images to divide: at least one class needs two, or add train and test splits"
        )
    held_out = set(test)
    train = [row for row in range(len(everything)) if row not in held_out]
    splits = {"train": everything.select(train), "test": everything.select(sorted(test))}
    return splits, f"{where} without splits: divided 80/20 by class (seed {SPLIT_SEED})"


def split_of(stem: str) -> str | None:
    """Return the split that a file or folder of this name is: ``train``, ``validation``, ``test`` or none."""
    match = _SPLIT.match(stem)
    return _ALIASES[match[1].lower()] if match else None
