"""Augmentation by timm: RandAugment of single images, mixup and CutMix of batches.

What is drawn depends on the seed, the epoch and the number of the image (or the step) alone, never on what was drawn
before: a resumed training sees the same images as one that was not interrupted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import Dataset

from pyra.errors import ConfigError
from pyra.tasks.data.images import ImageDataset


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators, which timm draws from, and leave them as they were."""
    before, before_numpy = random.getstate(), np.random.get_state()
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    random.seed(int(seed))
    np.random.seed(int(seed))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


class AugmentedImages(Dataset[dict[str, Any]]):
    """The examples of an image data set, each image changed in a new way in every epoch.

    Args:
        data: of a training split.
        policy: of RandAugment, in timm's words, such as ``rand-m9-mstd0.5-inc1``.
        seed: of the draw.

    Attributes:
        epoch: the current one; the training loop sets it.

    Raises:
        ConfigError: for a policy that timm does not know.
    """

    def __init__(self, data: ImageDataset, policy: str, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0
        try:
            _check_parts(policy)
            self._transform = rand_augment_transform(policy, {"img_mean": data.mean_colour()})
        except (AssertionError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split()) or "unknown parts"
            raise ConfigError(
                f"--randaugment {policy!r} is no policy of timm ({reason}); rand-m9-mstd0.5-inc1 is one"
            ) from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.fromarray(self.data.squashed(index).permute(1, 2, 0).numpy())
        with drawn_from(self.seed, self.epoch, index):
            changed = self._transform(image)
        pixels = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
        return {"pixel_values": self.data.normalised(pixels), "labels": self.data.labels[index]}


_PARTS = re.compile(r"rand(-(m|mmax|n|p|mstd|inc)\d+(\.\d+)?|-t\w+)*")


def _check_parts(policy: str) -> None:
    """Timm skips what it does not understand; a misspelt policy would train as another one."""
    if _PARTS.fullmatch(policy) is None:
        raise ValueError("parts are rand, then -m9 -n2 -p0.5 -mstd0.5 -mmax10 -inc1 -tweights")


class Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (1905.04899) of the images of a batch, in turn by chance.

    Args:
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        smoothing: share of each label that is spread over all classes.
        classes: number of classes.
        seed: of the draw.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, classes: int, seed: int) -> None:
        self.seed, self.smoothing, self.classes = seed, smoothing, classes
        self._mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)

    def __call__(self, pixels: Tensor, labels: Tensor, *position: int) -> tuple[Tensor, Tensor]:
        """Mix a batch; the last image of an odd number stays as it is.

        Args:
            pixels: [B, 3, S, S].
            labels: [B].
            position: numbers that say where in the training the batch stands.

        Returns:
            Mixed images [B, 3, S, S] and the share of each class [B, classes].
        """
        paired = len(pixels) - len(pixels) % 2
        mixed = pixels.clone()
        shares = mixup_target(labels, self.classes, smoothing=self.smoothing)
        if paired:
            with drawn_from(self.seed, *position):
                mixed[:paired], shares[:paired] = self._mix(mixed[:paired], labels[:paired])
        return mixed, shares
