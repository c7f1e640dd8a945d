"""Labels keep apart, at every size."""

from __future__ import annotations

import random

import pytest

from pyra.tasks.reports.layout import Plot, _text_size
from pyra.tasks.reports.page import _WIDTHS, label_area, step
from pyra.tasks.reports.placement import place_labels


def overlaps(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def check_labels(boxes, points, radii, bounds):
    for index, box in enumerate(boxes):
        assert bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
        assert not any(overlaps(box, other) for other in boxes[:index])
        discs = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(points, radii, strict=True)]
        assert not any(overlaps(box, disc) for disc in discs)


@pytest.mark.parametrize("same_place", [False, True])
def test_labels_never_overlap(same_place):
    rng = random.Random(3)
    for count in (1, 4, 20):
        points = [(rng.uniform(40, 560), rng.uniform(40, 360)) for _ in range(count)]
        points = [(300.0, 200.0)] * count if same_place else points
        boxes = place_labels(points, [8.0] * count, [(110.0, 18.0)] * count, (0, 0, 600, 400))
        check_labels(boxes, points, [8.0] * count, (0, 0, 600, 400))


def test_a_lone_label_is_next_to_its_point_and_an_impossible_one_is_left_out():
    (box,) = place_labels([(100, 100)], [5], [(50, 10)], (0, 0, 300, 300))
    assert box == (109, 95, 159, 105)
    assert place_labels([(100, 100)], [5], [(500, 10)], (0, 0, 300, 300)) == [None]
    (avoiding,) = place_labels([(100, 100)], [5], [(50, 10)], (0, 0, 300, 300), [(100, 100, 300, 100)])
    assert not overlaps(avoiding, (100, 99, 300, 101))


@pytest.mark.parametrize("width", [_WIDTHS[0], 440, _WIDTHS[-1]])
def test_every_label_of_twenty_points_has_a_place_at_every_width(width, make):
    rng = random.Random(0)
    plot = Plot(
        [
            make(rng.choice(["LoRA + PYRA", "LoRA + ToMe"]), 0.4 + 0.4 * rng.random(), 100 + 900 * rng.random(), seed=i)
            for i in range(20)
        ]
    )
    drawn = step(plot, width)
    assert len({label["text"] for label in drawn["annotations"]}) == 20
    area = label_area(width, drawn["height"])
    points = plot.pixels(area, plot.xs, plot.ys)
    boxes = []
    for (x, y), label in zip(points, drawn["annotations"], strict=True):
        half_width, half_height = (side / 2 - 0.1 for side in _text_size(label["text"], label["font"]["size"]))
        x, y = x + label["ax"], y + label["ay"]
        boxes.append((x - half_width, y - half_height, x + half_width, y + half_height))
    check_labels(boxes, points, [diameter / 2 for diameter in plot.diameters], area)
