"""Decoded and resized images on disk, memory-mapped: a split is decoded once, and all processes share its pages.

cache/pixels/
KEY.u8      uint8 [readable images, 3, S, S], nothing else
KEY.json    what it was made from, its SHA-256, and which rows could not be read

``KEY`` is a digest of the split's own digest, the size, the filter and the releases that pixels depend on. Files appear
whole or not at all, are checked when they are opened and never change after that, so that any number of processes may
read and write at once. The entries that were used least recently go when the limit is reached.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from pyra.errors import ConfigError
from pyra.files import atomic_path, read_json, write_json
from pyra.records import record_problems
from pyra.tasks.data.decoding import decoded, split_digest

FOLDER, LIMIT, OFF = "PYRA_CACHE", "PYRA_CACHE_LIMIT", ("off", "none", "0", "false", "no")
"""Environment variables: where the cache lies (or one of ``OFF``), and its size in GiB."""

GIB = 1024**3
DEFAULT_LIMIT = 20 * GIB
SMALLEST = 2**20
"""Bytes of pixels below which a split is decoded anew: opening an entry would take as long."""

FORMAT = 1
_SPARE = 64 * 2**20  # bytes that stay free on the disk
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to no running process


@dataclass(frozen=True)
class Key:
    """What the pixels of a split depend on."""

    split: str
    images: int
    side: int
    interpolation: str
    layout: str = "uint8 [N, 3, S, S], RGB, squash"
    format: int = FORMAT
    pillow: str = PIL.__version__
    most_pixels: int | None = field(default_factory=lambda: Image.MAX_IMAGE_PIXELS)

    @property
    def name(self) -> str:
        """Name of the files, without the suffix."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Pixels:
    """Pixels of the readable rows of a split, in order, uint8 [readable, 3, S, S], and why the others are not."""

    values: torch.Tensor
    broken: dict[int, str]


@dataclass(frozen=True)
class Entry:
    """What the file beside the pixels says; ``name`` is what the data set was called when it was decoded."""

    key: dict[str, str | int | None]
    name: str
    bytes: int
    sha256: str
    broken: dict[str, str]


@dataclass(frozen=True)
class PixelCache:
    """A folder of decoded splits, at most ``limit`` bytes of them."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    def open(self, rows: datasets.Dataset, side: int, interpolation: str, name: str) -> Pixels | None:
        """Return the pixels of a split, from disk or after having decoded it to disk.

        None where that is not to be or cannot be: the split is small, or there is no room for it or no permission (a
        warning says so, once).
        """
        size = len(rows) * 3 * side**2
        if size < SMALLEST:
            return None
        key = Key(split_digest(rows), len(rows), side, interpolation)
        found = self._read(key)
        if found is not None:
            return found
        try:
            self._make_room(size, key)
            self._write(key, decoded(rows, side, interpolation, name), name)
        except OSError as error:
            reason = error.strerror or str(error)
            warnings.warn(
                f"decoded images cannot be kept in {self.folder} ({reason}): every run decodes them again. Free some "
                f"space, name another folder with {FOLDER}, or turn the cache off with --no-cache",
                stacklevel=2,
            )
            return None
        return self._read(key)

    def entries(self) -> list[tuple[Path, int, float]]:
        """Return the file, the bytes and the time of the last use of each entry, the oldest first."""
        found = []
        for file in self._pixels.glob("*.u8"):
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                size = file.stat().st_size
                beside = file.with_suffix(".json")
                found.append((file, size, (beside if beside.exists() else file).stat().st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def listed(self) -> list[dict[str, str | int | float]]:
        """Return a row of a table for each entry, the last used first; damaged ones are named so."""
        rows: list[dict[str, str | int | float]] = []
        for file, size, used in reversed(self.entries()):
            name, side, images = "damaged", 0, 0
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                entry = Entry(**read_json(file.with_suffix(".json")))
                name, side, images = entry.name, int(entry.key["side"] or 0), int(entry.key["images"] or 0)
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
            rows.append({"data": name, "images": images, "side": side, "MiB": size / 2**20, "last used": when})
        return rows

    def clear(self) -> int:
        """Remove all entries and return their bytes; processes that read them are not disturbed."""
        entries = self.entries()
        for file, _, _ in entries:
            self._remove(file)
        self._sweep()
        return sum(size for _, size, _ in entries)

    @property
    def _pixels(self) -> Path:
        return self.folder / "pixels"

    def _read(self, key: Key) -> Pixels | None:
        file = self._pixels / f"{key.name}.u8"
        beside = file.with_suffix(".json")
        try:
            values = read_json(beside)
            if record_problems(Entry, values):
                return None
            entry = Entry(**values)
            shape = (key.images - len(entry.broken), 3, key.side, key.side)
            if entry.key != asdict(key) or not entry.bytes == file.stat().st_size == int(np.prod(shape)):
                return None
            mapped = torch.from_file(str(file), shared=False, size=entry.bytes, dtype=torch.uint8)
            broken = {int(row): str(reason) for row, reason in entry.broken.items()}
        except (OSError, ValueError, RuntimeError):  # not there, removed meanwhile, or not ours
            return None
        if hashlib.sha256(mapped.numpy().data).hexdigest() != entry.sha256:
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(beside)
        return Pixels(mapped.view(shape), broken)

    def _write(self, key: Key, images: Iterator[NDArray[np.uint8] | str], name: str) -> None:
        """Write an entry; not forced to disk: after a power cut, the check in :meth:`_read` finds what is missing."""
        digest, size, broken = hashlib.sha256(), 0, {}
        file = self._pixels / f"{key.name}.u8"
        with atomic_path(file) as temporary, temporary.open("wb") as out:
            for row, image in enumerate(images):
                if isinstance(image, str):
                    broken[str(row)] = image
                    continue
                out.write(image.data)
                digest.update(image.data)
                size += image.nbytes
            out.flush()
            os.fsync(out.fileno())  # the name must not outlive the content when the power goes
        write_json(file.with_suffix(".json"), Entry(asdict(key), name, size, digest.hexdigest(), broken))

    def _make_room(self, size: int, key: Key) -> None:
        """Remove the oldest entries until ``size`` more bytes fit; raises :class:`OSError` where they cannot."""
        if size > self.limit:
            raise OSError(errno.EDQUOT, f"a split is larger than {LIMIT}, {self.limit / GIB:g} GiB")
        self._pixels.mkdir(parents=True, exist_ok=True)
        self._sweep()
        entries = [entry for entry in self.entries() if entry[0].stem != key.name]
        total = sum(entry[1] for entry in entries)
        for file, taken, _ in entries:
            if total + size <= self.limit:
                break
            self._remove(file)
            total -= taken
        free = shutil.disk_usage(self._pixels).free
        if free < size + _SPARE:
            raise OSError(errno.ENOSPC, "the disk is full")

    def _sweep(self) -> None:
        """Remove what killed processes have left."""
        for file in self._pixels.glob(".*.u8*"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _ABANDONED:
                    file.unlink()

    @staticmethod
    def _remove(file: Path) -> None:
        for part in (file.with_suffix(".json"), file):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def default_cache() -> PixelCache | None:
    """Return the cache that the environment asks for, or None where it is off.

    Raises:
        ConfigError: where ``PYRA_CACHE_LIMIT`` is no number of GiB.
    """
    asked = os.environ.get(FOLDER, "").strip()
    if asked.lower() in OFF:
        return None
    if not asked:
        asked = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pyra")
    limit = os.environ.get(LIMIT, "").strip()
    try:
        size = float(limit) * GIB if limit else DEFAULT_LIMIT
        if not 0 <= size < 2**62:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{LIMIT} is {limit!r}; give a number of GiB, such as 20, or set {FOLDER}=off") from None
    return PixelCache(Path(asked).expanduser(), int(size))
