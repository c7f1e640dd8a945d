"""Safe decoding of images, one or all of a split, and the `squash` preprocessing.

`squash` resizes an image straight to the square, whatever its aspect ratio: what the VTAB-1k protocol does.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from tqdm import tqdm

INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is decoded; Pillow's other readers stay off: its PostScript one starts another program."""

_CHUNK = 32
_NAMED = 5


def decode_image(
    source: bytes | str | Path, *, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Decode an encoded image (bytes, or the path of a file) completely, to upright RGB.

    EXIF orientation is applied, transparency is laid over white, and 16-bit grey is scaled to 8 bits.

    Args:
        source: the bytes, or the path.
        max_pixels: that are decoded at most; ``PIL.Image.MAX_IMAGE_PIXELS`` where it is None. The header is asked:
            nothing of a larger image is decoded.
        formats: that are decoded, of :data:`FORMATS`.

    Raises:
        ValueError: for 32-bit pixels: nothing says what is white; for a pipe or a device: it may never end.
        Exception: whatever Pillow raises for a damaged file (its decoders have no common base class).
        Image.DecompressionBombError: more pixels than ``max_pixels``.
    """
    with _opened(source, max_pixels, formats) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def check_header(source: bytes | str | Path, *, max_pixels: int | None = None) -> None:
    """Raise as :func:`decode_image` does where the first bytes of an image already tell that it cannot be decoded."""
    with _opened(source, max_pixels, FORMATS):
        pass


@contextmanager
def _opened(source: bytes | str | Path, max_pixels: int | None, formats: tuple[str, ...]) -> Iterator[ImageFile]:
    if not isinstance(source, bytes):
        _refuse_pipe(source)
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except Image.DecompressionBombError as error:  # Pillow's own words name twice its limit
        found = next(iter(re.findall(r"\d+", str(error))), "too many")
        raise Image.DecompressionBombError(f"{found} pixels, more than the {limit} allowed") from None
    with opened as image:
        pixels = image.width * image.height
        # Pillow itself only warns up to twice its limit.
        if limit is not None and pixels > limit:
            raise Image.DecompressionBombError(f"{pixels} pixels, more than the {limit} allowed")
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # convert() would clip to 0..255 whatever the values mean
        raise ValueError("32-bit pixels, whose range no file says; store it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def unreadable(error: Exception) -> str:
    """Return in one line why :func:`decode_image` failed."""
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory, or the path once more
        return "not an image in a known format"
    return next(iter(str(error).splitlines()), type(error).__name__)


def decode_row(row: Any) -> Image.Image:
    """Decode the column `image` (``{"bytes", "path"}``) of a row; raises as :func:`decode_image`."""
    stored = row["image"]
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("the row holds no image")
    return decode_image(stored["path"] if stored["bytes"] is None else stored["bytes"])


def stored_bytes(row: Any) -> bytes:
    """Return the image of a row as it is stored, encoded; nothing where there is none or its file cannot be read."""
    stored = row["image"] or {"bytes": None, "path": None}
    if stored["bytes"] is not None or stored["path"] is None:
        return stored["bytes"] or b""
    try:
        _refuse_pipe(stored["path"])
        return Path(stored["path"]).read_bytes()
    except (OSError, ValueError):
        return b""


def _refuse_pipe(path: str | Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")


def split_digest(rows: datasets.Dataset) -> str:
    """Return the SHA-256 of a split: its images as they are stored, and their labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(stored_bytes(row)).digest() + int(row["label"]).to_bytes(4, "big"))
    return digest.hexdigest()


def squash(image: Image.Image, side: int, interpolation: str) -> NDArray[np.uint8]:
    """Resize to uint8 [3, S, S]."""
    resized = np.asarray(image.resize((side, side), INTERPOLATIONS[interpolation]))
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


def decoded(rows: datasets.Dataset, side: int, interpolation: str, name: str) -> Iterator[NDArray[np.uint8] | str]:
    """Decode all rows in threads; yield for each, in order, its pixels [3, S, S], or why it cannot be read.

    Few images wait to be taken, however many rows there are. A progress bar shows ``name``.
    """

    def decode(chunk: range) -> list[NDArray[np.uint8] | str]:
        found: list[NDArray[np.uint8] | str] = []
        for index in chunk:
            try:
                found.append(squash(decode_row(rows[index]), side, interpolation))
            except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
                found.append(unreadable(error))
        return found

    workers = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=workers)
    waiting: deque[Future[list[NDArray[np.uint8] | str]]] = deque()
    try:
        with tqdm(total=len(rows), desc=f"decoding {name}", unit="image", leave=False, disable=None) as bar:

            def first() -> list[NDArray[np.uint8] | str]:
                done = waiting.popleft().result()
                bar.update(len(done))
                return done

            for start in range(0, len(rows), _CHUNK):
                waiting.append(pool.submit(decode, range(start, min(start + _CHUNK, len(rows)))))
                if len(waiting) > 2 * workers:
                    yield from first()
            while waiting:
                yield from first()
    finally:
        pool.shutdown(cancel_futures=True)


def unreadable_rows(rows: datasets.Dataset, broken: dict[int, str]) -> list[str]:
    """Return what to call each broken row, with the reason."""
    return [f"{rows[index]['source']}: {reason}" for index, reason in broken.items()]


def summary(named: list[str], count: int) -> str:
    """Return in one line which of ``count`` images cannot be read.

    >>> summary(["a.png: no", "b.png: no"], 5)
    '2 of 5 images cannot be read: a.png: no; b.png: no'
    """
    more = len(named) - _NAMED
    listed = "; ".join(named[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return f"{len(named)} of {count} images cannot be read: {listed}"
