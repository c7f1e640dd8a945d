"""Predictions for image files: which files are meant, decoding beside the model, and which cannot be read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pyra.errors import ConfigError, DataError
from pyra.tasks.classifier import Classifier, Score
from pyra.tasks.data.decoding import check_header, decode_image, summary, unreadable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
"""What is taken from a folder; a file that is named itself may be called anything."""


@dataclass(frozen=True)
class Prediction:
    """What a model answers on one image.

    Attributes:
        image: the file.
        label: the most probable class.
        index: its number, from 0.
        probability: of it, in [0, 1].
        top: the most probable classes, the best one first.
        milliseconds: to read, decode and prepare the image, and its share of the model's time for its batch.
    """

    image: str
    label: str
    index: int
    probability: float
    top: list[Score]
    milliseconds: float


@dataclass(frozen=True)
class Skipped:
    """An image that cannot be read, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class _Read:
    """A file as the model takes it, uint8 [3, S, S]."""

    name: str
    pixels: Tensor
    seconds: float


def image_files(names: Sequence[str]) -> list[Path]:
    """Return the files that are meant: files as they are named, and the images in folders, at any depth, sorted.

    Raises:
        DataError: for what does not exist (all of it in one message), or a folder without images.
    """
    paths = [Path(name).expanduser() for name in names]
    missing = [_shown(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"no such image{'s' * (len(missing) > 1)}: {', '.join(missing[:5])}")
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise DataError(f"{_shown(path)} holds no images ({', '.join(SUFFIXES)})")
        files += found
    return files


def readable(files: Sequence[Path], *, skip_broken: bool = False) -> tuple[list[Path], list[Skipped]]:
    """Look at the beginning of every file, so that what is no image is known before a model is opened.

    Returns:
        The files that begin as an image does, and with ``skip_broken`` the others.

    Raises:
        DataError: where a file is none and ``skip_broken`` is off.
    """
    good: list[Path] = []
    broken: list[Skipped] = []
    for file in files:
        try:
            check_header(file)
        except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
            broken.append(_skipped(file, error))
        else:
            good.append(file)
    if broken and not skip_broken:
        raise _refused(broken, len(files))
    return good, broken


def predict_files(
    classifier: Classifier,
    files: Sequence[Path],
    *,
    top: int = 5,
    batch_size: int = 16,
    skip_broken: bool = False,
) -> tuple[list[Prediction], list[Skipped]]:
    """Classify image files, in their order, the next batch decoded meanwhile; long work shows a progress bar on stderr.

    Args:
        classifier: from :func:`pyra.tasks.predicting.open_classifier`.
        files: images, as :func:`image_files` finds them.
        top: classes to list for each, all of them where there are fewer.
        batch_size: images a forward.
        skip_broken: leave out what cannot be read.

    Returns:
        The predictions, and what was left out.

    Raises:
        DataError: for an image that cannot be read where ``skip_broken`` is off.
        ConfigError: for a ``top`` or ``batch_size`` below 1.
    """
    wrong = [f"--{name} must be at least 1, got {n}" for name, n in (("top", top), ("batch-size", batch_size)) if n < 1]
    if wrong:
        raise ConfigError("; ".join(wrong))
    predictions: list[Prediction] = []
    skipped: list[Skipped] = []
    with tqdm(total=len(files), desc="predicting", unit="image", leave=False, disable=None, delay=1) as bar:
        for batch in _batches(classifier, files, batch_size):
            broken = [item for item in batch if isinstance(item, Skipped)]
            if broken and not skip_broken:
                raise _refused(broken, len(files))
            skipped += broken
            if read := [item for item in batch if isinstance(item, _Read)]:
                predictions += _answers(classifier, read, top)
            bar.update(len(batch))
    return predictions, skipped


def _batches(classifier: Classifier, files: Sequence[Path], size: int) -> Iterator[list[_Read | Skipped]]:
    """Yield what was read of ``size`` files at a time; the next ones are read meanwhile."""

    def read(file: Path) -> _Read | Skipped:
        start = time.perf_counter()
        try:
            pixels = classifier.prepare(decode_image(file))
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            return _skipped(file, error)
        return _Read(_shown(file), pixels, time.perf_counter() - start)

    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    left = iter(files)

    def begin() -> list[Future[_Read | Skipped]]:
        return [pool.submit(read, file) for file in islice(left, size)]

    try:
        waiting = begin()
        while waiting:
            following = begin()
            yield [future.result() for future in waiting]
            waiting = following
    finally:
        pool.shutdown(cancel_futures=True)


def _answers(classifier: Classifier, images: Sequence[_Read], top: int) -> list[Prediction]:
    start = time.perf_counter()
    probabilities = classifier.probabilities(torch.stack([image.pixels for image in images]))
    share = (time.perf_counter() - start) / len(images)
    found = []
    for image, row in zip(images, probabilities, strict=True):
        top_scores = classifier.best(row, top)
        best, took = top_scores[0], round(1000 * (image.seconds + share), 3)
        found.append(Prediction(image.name, best.label, int(row.argmax()), best.probability, top_scores, took))
    return found


def _shown(file: Path) -> str:
    """Return a file's name as text that JSON can hold, whatever its bytes are."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _skipped(file: Path, error: Exception) -> Skipped:
    return Skipped(_shown(file), getattr(error, "strerror", None) or unreadable(error))


def _refused(broken: Sequence[Skipped], count: int) -> DataError:
    named = [f"{one.image}: {one.reason}" for one in broken]
    return DataError(f"{summary(named, count)}. Repair or remove them, or leave them out with --skip-broken")
