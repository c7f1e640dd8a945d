"""Augmentation: what mixing gives by its definition, and that draws depend on the position alone."""

from __future__ import annotations

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pyra.errors import ConfigError
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.fitting.augmentation import AugmentedImages, Mixing

CLASSES = 5


def batch(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    labels = torch.arange(images) % CLASSES
    return torch.randn(images, 3, 16, 16, generator=generator), labels


def test_mixup_mixes_images_and_labels_by_one_share() -> None:
    pixels, labels = batch(4)  # labels 0 1 2 3: each image's partner is of another class
    shares_seen = set()
    for step in range(8):
        mixed, shares = Mixing(0.8, 0.0, 0.0, CLASSES, seed=0)(pixels, labels, step, 0, 0)
        share = shares[0, 0]
        torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.flip(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(shares[torch.arange(4), labels.flip(0)], (1 - share).expand(4))
        shares_seen.add(float(share))
    assert len(shares_seen) == 8


def test_cutmix_pastes_the_share_that_the_labels_name() -> None:
    pixels, labels = batch(4)
    mixed, shares = Mixing(0.0, 1.0, 0.0, CLASSES, seed=1)(pixels, labels, 3, 0, 0)
    own, other = (mixed == pixels).all(1), (mixed == pixels.flip(0)).all(1)
    assert (own | other).all() and other.any()
    torch.testing.assert_close(own.float().mean((1, 2)), shares[torch.arange(4), labels])


@pytest.mark.parametrize("images", [1, 3])
def test_an_odd_one_out_stays_as_it_is(images: int) -> None:
    pixels, labels = batch(images)
    mixed, shares = Mixing(0.8, 1.0, 0.1, CLASSES, seed=0)(pixels, labels, 0)
    assert torch.equal(mixed[-1], pixels[-1])
    assert shares[-1, labels[-1]] == pytest.approx(0.9 + 0.1 / CLASSES)
    assert shares.shape == (images, CLASSES)


def test_a_draw_depends_on_seed_and_position_and_leaves_the_generators() -> None:
    pixels, labels = batch(4)
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    mixing = Mixing(0.8, 1.0, 0.1, CLASSES, seed=0)
    first, again, later = mixing(pixels, labels, 1, 0), mixing(pixels, labels, 1, 0), mixing(pixels, labels, 2, 0)
    assert (random.random(), np.random.rand()) == expected
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], later[1])


@pytest.fixture
def images() -> ImageDataset:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0, 1, 0], "source": ["one", "two", "three"]},
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "label": datasets.ClassLabel(names=["a", "b"]),
                "source": datasets.Value("string"),
            }
        ),
    )
    return ImageDataset(rows, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_randaugment_changes_an_image_anew_in_every_epoch(images: ImageDataset) -> None:
    changed = AugmentedImages(images, "rand-m9-mstd0.5-inc1", seed=0)
    assert len(changed) == 3
    first = [changed[i]["pixel_values"] for i in range(3)]
    again = [changed[i]["pixel_values"] for i in reversed(range(3))][::-1]
    changed.epoch = 1
    later = [changed[i]["pixel_values"] for i in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(first, later, strict=True))
    assert any(not torch.equal(one, images[i]["pixel_values"]) for i, one in enumerate(first))
    assert [int(changed[i]["labels"]) for i in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("policy", ["", "rand-q9", "augmix-m9", "rand-mxx"])
def test_a_policy_that_timm_does_not_know(policy: str, images: ImageDataset) -> None:
    with pytest.raises(ConfigError, match="no policy of timm"):
        AugmentedImages(images, policy, seed=0)
