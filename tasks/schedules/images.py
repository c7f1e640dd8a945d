"""Images to calibrate on: a folder of pictures in any order, or the training split of a task; labels are not read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyra.backbones.loading import preprocessing
from pyra.errors import DataError
from pyra.tasks.data.decoding import decode_image, squash, unreadable
from pyra.tasks.data.task import ImageDataset, load_task, task_names

Item = TypeVar("Item")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def calibration_images(where: str, model: nn.Module, count: int, seed: int = 0, root: str | None = None) -> Tensor:
    """Draw images and prepare them as a timm model takes them.

    Args:
        where: a folder with pictures at any depth, one that ``--data`` takes (its training split), or a task's name.
        model: whose size and normalisation to use.
        count: images to draw; all where there are fewer.
        seed: of the draw.
        root: folder with the data of shipped tasks that bring none.

    Returns:
        [count, 3, S, S], in an order that depends on the seed only.

    Raises:
        DataError: where there are no images, or one cannot be read.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if files:
            return _from_files(_drawn(files, count, seed), model)
        rows = load_task(data=where).splits["train"]
    elif where in task_names() or not folder.exists():
        rows = load_task(where, root=root).splits["train"]
    else:
        raise DataError(f"--calibrate {where} is a file: give a folder of images, or the name of a task")
    how = preprocessing(model)
    some = rows.select(_drawn(range(len(rows)), count, seed))
    data = ImageDataset(some, image_size=how.image_size, mean=how.mean, std=how.std, name="calibration images")
    return torch.stack([data[index]["pixel_values"] for index in range(len(data))])


def _drawn(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    return random.Random(seed).sample(items, min(count, len(items)))


def _from_files(files: list[Path], model: nn.Module) -> Tensor:
    how = preprocessing(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    pixels = []
    for file in files:
        try:
            pixels.append(torch.from_numpy(squash(decode_image(file), how.image_size, "bicubic")))
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise DataError(f"{file} cannot be read as an image: {unreadable(error)}") from None
    return (torch.stack(pixels).float() / 255 - mean) / std
