"""dSprites, drawn."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from pyra.tasks.data import sprites
from pyra.tasks.data.task import load_task


def test_factors_count_as_published() -> None:
    """Position y counts fastest, then x, orientation, scale, shape."""
    assert sprites.COUNT == 737_280
    found = sprites.factors(np.array([0, 1, 32, 1024, 40 * 1024, 6 * 40 * 1024, sprites.COUNT - 1]))
    assert [tuple(int(found[name][i]) for name in found) for i in range(7)] == [
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 1),
        (0, 0, 0, 1, 0),
        (0, 0, 1, 0, 0),
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (2, 5, 39, 31, 31),
    ]


def number(**factors: int) -> np.ndarray:
    value = 0
    for name, size in sprites.SIZES.items():
        value = value * size + factors.get(name, 0)
    return np.array([value])


@pytest.mark.parametrize("shape", range(3))
def test_a_shape_moves_by_pixels_and_grows(shape: int) -> None:
    here = sprites.render(number(shape=shape, x=3, y=5))[0]
    moved = sprites.render(number(shape=shape, x=13, y=6))[0]
    assert np.array_equal(np.roll(here, (1, 10), (0, 1)), moved), "x goes to the right, y down"
    areas = [int((sprites.render(number(shape=shape, scale=scale)) > 0).sum()) for scale in range(6)]
    assert areas == sorted(areas) and areas[5] == pytest.approx(4 * areas[0], rel=0.15)
    assert set(np.unique(here)) == {0, 255}


def test_orientations() -> None:
    turned = [sprites.render(number(shape=2, scale=5, orientation=o))[0] for o in range(40)]
    assert np.array_equal(turned[0], turned[39]), "0 and 2 pi"
    assert len({image.tobytes() for image in turned}) == 39
    square = [sprites.render(number(shape=0, scale=5, orientation=o))[0] for o in (0, 5)]
    assert not np.array_equal(*square)


def test_no_shape_touches_the_border() -> None:
    corners = [number(shape=s, scale=5, orientation=o, x=x, y=x) for s in range(3) for o in range(40) for x in (0, 31)]
    images = sprites.render(np.concatenate(corners))
    assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any()
    assert images.any((1, 2)).all()


def test_labels_are_sixteen_bins() -> None:
    numbers = np.concatenate([number(orientation=o, x=x) for o in range(40) for x in range(32)])
    for factor, size in (("orientation", 40), ("x", 32)):
        counts = np.bincount(sprites.labels(numbers, factor))
        assert len(counts) == 16 and set(counts) <= {len(numbers) * n // size for n in (2, 3)}


def test_draws_are_the_same_everywhere_and_have_nothing_in_common() -> None:
    first, second = sprites.draw_split(800, 1000), sprites.draw_split(200, 1000, 800)
    assert not set(first) & set(second) and len(set(first)) == 800
    assert first[:3].tolist() == sprites.draw_split(3, 1000).tolist() != sprites.draw_split(3, 1).tolist()
    digest = hashlib.sha256(sprites.render(first).tobytes()).hexdigest()
    assert digest.startswith("bfc65175cee74080"), (
        "pixels changed: results before and after cannot be compared; raise the version"
    )
    with pytest.raises(ValueError, match="737280 images, asked for 737000 to 738000"):
        sprites.draw_split(1000, 0, 737_000)


@pytest.mark.slow  # draws whole tasks
def test_the_tasks() -> None:
    task = load_task("dsprites_ori")
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 1000,
        "train800": 800,
        "val200": 200,
        "validation": 200,
        "test": 73_728,
    }
    row = task.splits["train"][0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)
    sources = [set(task.splits[name]["source"][:]) for name in ("train800", "val200", "test")]
    assert sum(map(len, sources)) == len(set.union(*sources))
    where = load_task("dsprites_loc")
    assert where.splits["train"][0]["source"] == row["source"]
    numbers = np.array([int(row["source"].split()[1])])
    assert row["label"] == sprites.labels(numbers, "orientation")[0]
    assert where.splits["train"][0]["label"] == sprites.labels(numbers, "x")[0]
