"""Images as tensors: safe decoding, the `squash` preprocessing and the data set that training and evaluation read.

`squash` resizes an image straight to the square, whatever its aspect ratio: what the VTAB-1k protocol does.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from pyra.errors import ConfigError, DataError, did_you_mean

MEMORY_LIMIT = 2 * 1024**3
"""Decoded bytes up to which a data set is kept in memory."""

INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is decoded; Pillow's other readers stay off: its PostScript one starts another program."""

_CHUNK = 32
_NAMED = 5


def decode_image(source: bytes | str | Path) -> Image.Image:
    """Decode an encoded image (bytes, or the path of a file) completely, to upright RGB.

    EXIF orientation is applied, transparency is laid over white, and 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: for 32-bit pixels: nothing says what is white.
        Exception: whatever Pillow raises for a damaged file (its decoders have no common base class).
        Image.DecompressionBombError: more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        pixels = image.width * image.height
        # Pillow itself only warns up to twice the limit.
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{pixels} pixels, more than the {Image.MAX_IMAGE_PIXELS} allowed")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # convert() would clip to 0..255 whatever the values mean
        raise ValueError("32-bit pixels, whose range no file says; store it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def unreadable(error: Exception) -> str:
    """Return in one line why :func:`decode_image` failed."""
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory, or the path once more
        return "not an image in a known format"
    return next(iter(str(error).splitlines()), type(error).__name__)


class ImageDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples ``{"pixel_values": float32 [3, S, S] normalised, "labels": int}`` of one split.

    Every image is decoded once here, in threads: so a damaged file is found before training starts, and up to
    :data:`MEMORY_LIMIT` the resized pixels are kept as one uint8 tensor; above it, images are decoded on access.

    Args:
        rows: columns `image` (``{"bytes", "path"}``), `label` (class index) and `source` (what errors call the row).
        image_size: side ``S`` of the square in pixels.
        mean: per channel, on the scale 0..1.
        std: per channel, on the scale 0..1.
        interpolation: a resampling filter of Pillow, by name.
        skip_broken: leave unreadable images out and list them in ``broken``.
        name: what errors and the progress bar call this data set.

    Attributes:
        pixels: uint8 [images, 3, S, S], or None above :data:`MEMORY_LIMIT`.

    Raises:
        DataError: an image cannot be read and ``skip_broken`` is off, or no image of a class is left.
        ConfigError: unknown ``interpolation``, or an ``image_size`` below 1.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        skip_broken: bool = False,
        name: str = "images",
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            hint = did_you_mean(interpolation, INTERPOLATIONS)
            raise ConfigError(f"unknown interpolation {interpolation!r}{hint}; choose from {', '.join(INTERPOLATIONS)}")
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}; it must be at least 1 pixel")
        if len(rows) == 0:
            raise DataError(f"{name} is empty: add images to it")
        self.image_size = image_size
        self.broken: list[str] = []
        self._resample = INTERPOLATIONS[interpolation]
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self._rows = rows
        self.pixels: torch.Tensor | None = None
        if len(rows) * 3 * image_size**2 <= MEMORY_LIMIT:
            self.pixels = torch.empty(len(rows), 3, image_size, image_size, dtype=torch.uint8)
        self._keep(self._decode_all(name), skip_broken, name)
        self.labels: list[int] = self._rows["label"][:]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.normalised(self.squashed(index)), "labels": self.labels[index]}

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of their numbers."""
        return list(self._rows.features["label"].names)

    def squashed(self, index: int) -> torch.Tensor:
        """Return the image resized to the square, uint8 [3, S, S]."""
        return self._squash(self.image(index)) if self.pixels is None else self.pixels[index]

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 pixels [..., 3, S, S] as the model takes them, float32."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def mean_colour(self) -> tuple[int, ...]:
        """Return the colour that is zero after normalisation, 0..255 a channel."""
        return tuple(round(255 * value) for value in self._mean.flatten().tolist())

    @property
    def rows(self) -> datasets.Dataset:
        """The images as they are stored, without those left out."""
        return self._rows

    def image(self, index: int) -> Image.Image:
        """Return the image as stored: RGB, in its own size and shape."""
        stored = self._rows[index]["image"]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ValueError("the row holds no image")
        return decode_image(stored["path"] if stored["bytes"] is None else stored["bytes"])

    def source(self, index: int) -> str:
        """Return where the image comes from: a path, or a parquet file and the row in it."""
        return str(self._rows[index]["source"])

    def _squash(self, image: Image.Image) -> torch.Tensor:
        """Resize to uint8 [3, S, S]."""
        resized = image.resize((self.image_size, self.image_size), self._resample)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def _decode_all(self, name: str) -> dict[int, str]:
        """Decode every image, keep the pixels if they fit, and return the broken rows with the reason."""
        broken: dict[int, str] = {}

        def decode(chunk: range) -> int:
            for index in chunk:
                try:
                    pixels = self._squash(self.image(index))
                except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
                    broken[index] = unreadable(error)
                else:
                    if self.pixels is not None:
                        self.pixels[index] = pixels
            return len(chunk)

        count = len(self._rows)
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        try:
            with tqdm(total=count, desc=f"decoding {name}", unit="image", leave=False) as bar:
                for done in pool.map(decode, chunks):
                    bar.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
        return dict(sorted(broken.items()))

    def _keep(self, broken: dict[int, str], skip_broken: bool, name: str) -> None:
        """Drop the broken rows, or raise the error that names them."""
        if not broken:
            return
        self.broken = [f"{self.source(index)}: {reason}" for index, reason in broken.items()]
        if not skip_broken:
            more = len(self.broken) - _NAMED
            listed = "; ".join(self.broken[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
            raise DataError(
                f"{name}: {len(broken)} of {len(self._rows)} images cannot be read: {listed}. "
                "Repair or remove them, or leave them out with --skip-broken"
            )
        good = [index for index in range(len(self._rows)) if index not in broken]
        if not good:
            raise DataError(f"{name}: none of the {len(broken)} images can be read, for example {self.broken[0]}")
        labels = self._rows["label"][:]
        lost = sorted(set(labels) - {labels[index] for index in good})
        if lost:
            names = self._rows.features["label"].names
            raise DataError(
                f"{name}: no image of {', '.join(names[label] for label in lost[:_NAMED])} can be read, for example "
                f"{self.broken[0]}; a class that is left out would make the others look better"
            )
        self._rows = self._rows.select(good)
        if self.pixels is not None:
            self.pixels = self.pixels[good]
