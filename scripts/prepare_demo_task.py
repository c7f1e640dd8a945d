"""Make the demo task from clothing-dataset-small (public domain, CC0).

    python -m pyra.scripts.prepare_demo_task --source clothing_small --output tasks/demo

The source folder holds `train.parquet`, `validation.parquet` and `test.parquet` with the columns `image` and `label`.
The output is 100 training images a class, drawn with a fixed seed, and the other two splits whole; an image whose
bytes are also in one of those is never drawn. Images are shrunk to a short side of 112 px (Lanczos, no crop) and
stored as JPEG of quality 85, which keeps the files together below the 8 MiB that the package allows for its demo data.
"""

from __future__ import annotations

import io
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from pyra.errors import DataError
from pyra.scripts.cli import parse
from pyra.tasks.data.decoding import decode_image
from pyra.tasks.data.rows import read_parquet

LIMIT = 8 * 1024**2
SPLITS = ("train", "validation", "test")


@dataclass
class DemoTaskOptions:
    """Options of the conversion; the defaults made the shipped files."""

    source: str = field(metadata={"help": "folder with train.parquet, validation.parquet and test.parquet"})
    output: str = field(metadata={"help": "folder to write the files to"})
    per_class: int = field(default=100, metadata={"help": "training images a class (all where there are fewer)"})
    side: int = field(default=112, metadata={"help": "short side in pixels; smaller images stay as they are"})
    quality: int = field(default=85, metadata={"help": "JPEG quality"})
    seed: int = field(default=0, metadata={"help": "seed of the draw"})


def shrink(encoded: bytes, side: int, quality: int) -> bytes:
    """Re-encode an image as JPEG with a short side of at most ``side`` pixels."""
    image = decode_image(encoded)
    scale = side / min(image.size)
    if scale < 1:
        width, height = (max(1, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def draw(labels: list[Any], excluded: set[int], per_class: int, seed: int) -> list[int]:
    """Return ``per_class`` row numbers a class in rising order, rows in ``excluded`` left out."""
    rows = defaultdict(list)
    for row, label in enumerate(labels):
        if row not in excluded:
            rows[label].append(row)
    generator = random.Random(seed)
    return sorted(
        row for label in sorted(rows) for row in generator.sample(rows[label], min(per_class, len(rows[label])))
    )


def convert(split: str, rows: list[int], options: DemoTaskOptions) -> int:
    """Write the given rows of a split and return the size of the file in bytes."""
    source = Path(options.source) / f"{split}.parquet"
    table = pq.read_table(source, columns=["image", "label"])
    images = []
    for row in tqdm(rows, desc=split, unit="image", disable=None):
        image = table["image"][row].as_py()
        path = image["path"] or f"{split}/{row:06d}.jpg"
        images.append({"bytes": shrink(image["bytes"], options.side, options.quality), "path": path})
    storage = pa.array(images, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    made = pa.table([storage, table["label"].take(rows)], schema=table.schema)  # the schema carries the class names
    target = Path(options.output) / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, target, compression="zstd", use_dictionary=False, write_statistics=False)
    return target.stat().st_size


def prepare(options: DemoTaskOptions) -> None:
    """Write the splits and print what is in them.

    Raises:
        DataError: the source cannot be read, or the result is larger than the package allows.
    """
    parts = {split: read_parquet(Path(options.source) / f"{split}.parquet") for split in SPLITS}
    digests = {
        split: [sha256(image["bytes"]).digest() for image in part.images.to_pylist()] for split, part in parts.items()
    }
    held_out = {*digests["validation"], *digests["test"]}
    excluded = {row for row, digest in enumerate(digests["train"]) if digest in held_out}
    rows = {split: list(range(len(part.labels))) for split, part in parts.items()}
    rows["train"] = draw(parts["train"].labels, excluded, options.per_class, options.seed)
    size = sum(convert(split, rows[split], options) for split in SPLITS)
    counts = [Counter(parts[split].labels[row] for row in rows[split]) for split in SPLITS]
    print(f"| class | {' | '.join(SPLITS)} |\n|---|{'---:|' * len(SPLITS)}")
    for name in parts["train"].classes:
        print(f"| {name} | {' | '.join(str(count[name]) for count in counts)} |")
    print(f"| total | {' | '.join(str(count.total()) for count in counts)} |")
    print(f"{size / 1024**2:.2f} MiB in {options.output}")
    if size > LIMIT:
        raise DataError(f"{size} bytes are more than the {LIMIT} allowed: lower --side or --quality")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and convert."""
    options = parse(
        DemoTaskOptions,
        argv,
        prog="python -m pyra.scripts.prepare_demo_task",
        description="Make the demo task from clothing-dataset-small; the module's docstring says how.",
        example="python -m pyra.scripts.prepare_demo_task --source clothing_small --output tasks/demo",
    )
    try:
        prepare(options)
    except DataError as error:
        print(f"prepare_demo_task: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
