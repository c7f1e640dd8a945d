"""What a server allows. Together the limits bound its memory, whatever its clients send."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from PIL import Image

from pyra.errors import ConfigError
from pyra.records import ABOVE_0, AT_LEAST_0, bound_problems

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded for strangers: the readers of TIFF and JPEG 2000 have the longest lists of holes."""

FRAMING = 64 * 1024
"""Bytes that a multipart body may have beside its image."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Memory beside the model is bounded by the sum of

    * ``max_queue`` requests, each of which holds its image as it was sent (``max_bytes``, twice while the last byte
      comes in) or as the model takes it (3 S² bytes),
    * ``decode_threads`` images that are being decoded, up to ``25 * max_pixels`` bytes each (measured: a transparent
      WebP takes 24 bytes a pixel, a transparent PNG 16, a JPEG 4 or, rotated, 8),
    * one batch in the model,
    * the buffers of ``max_connections`` connections, about 0.4 MB each where all of them send at full speed.

    The defaults make that 0.64 + 1.25 + 0.1 GB at the very worst.

    Attributes:
        max_bytes: of an image as it is sent.
        max_pixels: of an image; its header is asked before it is decoded.
        max_queue: requests in work at once, from the first byte to the answer; others are told to come again.
        max_batch: images in a forward of the model.
        max_wait_ms: that an image waits for others to share its forward.
        timeout_s: from the first byte of a request to its answer.
        max_connections: that are open at once.
        decode_threads: images that are decoded at once.

    Raises:
        ConfigError: with every value that is out of bounds.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 25_000_000
    max_queue: int = 64
    max_batch: int = 16
    max_wait_ms: float = 5.0
    timeout_s: float = 30.0
    max_connections: int = 256
    decode_threads: int = 2

    def __post_init__(self) -> None:
        above = [field.name for field in dataclasses.fields(self) if field.name != "max_wait_ms"]
        problems = bound_problems(self, ABOVE_0, above) + bound_problems(self, AT_LEAST_0, ["max_wait_ms"])
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and self.max_pixels > most:
            problems.append(f"--max-pixels must be at most {most}, above which Pillow takes no image")
        if self.max_connections <= self.max_queue:
            problems.append(
                f"--max-connections must be above --max-queue ({self.max_queue}), got {self.max_connections}: the "
                "others are told to come again over theirs"
            )
        if problems:
            raise ConfigError("; ".join(problems))
