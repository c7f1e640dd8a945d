"""Methods against one of them, image by image: the paired differences of a folder of results.

Beside each result lies what was answered (:func:`pyra.tasks.results.predictions_file`): ``labels`` and ``predictions``
(class indices, one an image), ``split`` and ``sha256`` of the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pyra.errors import ConfigError, did_you_mean
from pyra.files import read_json
from pyra.tasks.comparison import Difference, Right, paired_difference
from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.formats import Table
from pyra.tasks.reports.groups import Group, differences, draw_of, draw_text, shown
from pyra.tasks.reports.table import value_text
from pyra.tasks.results import PREDICTIONS_FILE, PROTOCOLS, predictions_file

_CONTEXT = (
    "task", "task_version", "split", "test_sha256", "metric", "preprocessing", "backbone", "weights_sha256",
    "image_size",
)  # fmt: skip
_DRAWS, _FEWEST_DRAWS, _DRAWN = 5000, 1000, 20_000_000  # images drawn in all: a second


@dataclass(frozen=True)
class Comparison:
    """A method against the reference, on the seeds and images both have."""

    ours: Group
    theirs: Group
    draws: list[tuple[int, int]]
    images: int
    difference: Difference


class NoPairs(Exception):
    """Why two methods cannot be compared image by image."""


def compare(groups: Sequence[Group], method: str) -> tuple[list[Comparison], list[str]]:
    """Compare every other method with ``method``, on the same task, images and backbone.

    Returns:
        The comparisons, and a line for each that cannot be made, with the reason.

    Raises:
        ConfigError: no run of that method.
    """
    runs = [one for one in groups if not one.baseline]
    methods = sorted({one.row.method for one in runs})
    if method not in methods:
        raise ConfigError(
            f"--compare {method}: no run of that method{did_you_mean(method, methods)}; there are {', '.join(methods)}"
        )
    references = [one for one in runs if one.row.method == method]
    made, notes = [], []
    others = [one for one in runs if one.row.method != method]
    for one in tqdm(others, desc="comparing", unit="method", disable=None, leave=False):
        try:
            found = _comparison(one, _reference(one, references))
            made.append(found)
            if found.theirs.row.protocol == "published" != one.row.protocol:
                notes.append(
                    f"{method}, which {one.row.method} on {one.row.task} is compared with, was {PROTOCOLS['published']}"
                )
        except NoPairs as error:
            notes.append(
                f"{one.row.method} (rate {one.row.rate:.2f}) on {one.row.task} is not compared with {method}: {error}"
            )
    return made, notes


def comparison_table(made: Sequence[Comparison], method: str) -> Table:
    """Return differences with their 95 % intervals, in percentage points."""
    different = differences([one.ours for one in made])
    lines = []
    for one, text in zip(made, different, strict=True):
        found, metric = one.difference, one.ours.row.metric
        difference, low, high = (value_text(metric, x, sign=True) for x in (found.difference, found.low, found.high))
        names = [shown(one.ours, name) for name in ("task", "method", "protocol", "backbone")]
        shares = [value_text(metric, value) for value in (found.ours, found.theirs)]
        seeds = ",".join(map(draw_text, one.draws))
        lines.append(
            [*names, text, shown(one.ours, "rate"), *shares, difference, f"{low} to {high}", seeds, f"{one.images:,}"]
        )
    headers = [
        "task", "method", "protocol", "backbone", "with", "rate", "top-1 (%)", f"{method} (%)", "difference (points)",
        "95 % interval", "seeds", "images",
    ]  # fmt: skip
    dropped = [place for place, name in enumerate(headers) if name == "with" and not any(different)]
    kept = [place for place in range(len(headers)) if place not in dropped]
    return Table([headers[i] for i in kept], [[line[i] for i in kept] for line in lines], left=5 - len(dropped))


def comparison_record(one: Comparison) -> dict[str, Any]:
    """Return a comparison with full precision, as fractions."""
    return {
        "compared_with": one.theirs.row.method,
        "compared_seeds": [draw_text(draw) for draw in one.draws],
        "difference": one.difference.difference,
        "difference_low": one.difference.low,
        "difference_high": one.difference.high,
    }


def _reference(one: Group, references: Sequence[Group]) -> Group:
    same = [other for other in references if all(_equal(one, other, name) for name in _CONTEXT)]
    if not same:
        on_task = [other for other in references if other.row.task == one.row.task]
        if not on_task:
            raise NoPairs("there is no run of it on that task")
        wrong = [name for name in _CONTEXT if not any(_equal(one, other, name) for other in on_task)]
        raise NoPairs(f"its runs there have another {' and '.join(wrong or _CONTEXT[-3:])}".replace("_", " "))
    for name in ("protocol", "rate"):
        closer = [other for other in same if shown(other, name) == shown(one, name)]
        same = closer or same
    if len(same) > 1:
        raise NoPairs(f"{len(same)} rows of it differ in their settings: choose one with --where, or another folder")
    return same[0]


def _equal(one: Group, other: Group, name: str) -> bool:
    return bool(getattr(one.row, name) == getattr(other.row, name))


def _comparison(ours: Group, theirs: Group) -> Comparison:
    pairs = paired_answers(ours, theirs)
    difference = paired_difference(pairs.ours, pairs.theirs, draws=pairs.times)
    return Comparison(ours, theirs, pairs.draws, pairs.images, difference)


@dataclass(frozen=True)
class Pairs:
    """Which images two methods answer right, a seed an entry, on the seeds and images both have."""

    draws: list[tuple[int, int]]
    ours: list[Right]
    theirs: list[Right]

    @property
    def images(self) -> int:
        """Images of each seed."""
        return len(self.ours[0])

    @property
    def times(self) -> int:
        """Draws of a bootstrap that takes about a second at most."""
        return min(_DRAWS, max(_FEWEST_DRAWS, _DRAWN // (self.images * len(self.draws))))


def paired_answers(ours: Group, theirs: Group) -> Pairs:
    """Read what two methods answered; raises :class:`NoPairs` with the reason where it cannot be paired."""
    if ours.row.metric != "accuracy":
        raise NoPairs(f"it takes answers that are right or wrong (accuracy), the metric is {ours.row.metric}")
    left, right = ({draw_of(member.row): member for member in side.members} for side in (ours, theirs))
    draws = sorted(left.keys() & right.keys())
    if not draws:
        raise NoPairs(f"they share no seed ({_listed(left)} and {_listed(right)})")
    answers = [[_right(side[draw]) for draw in draws] for side in (left, right)]
    labels = [one[0] for side in answers for one in side]
    if not all(np.array_equal(labels[0], one) for one in labels[1:]):
        raise NoPairs(f"the labels in their {PREDICTIONS_FILE} differ")
    pairs = [[one[1].astype(np.float32) for one in side] for side in answers]
    return Pairs(draws, pairs[0], pairs[1])


def _right(one: Found) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return labels, and which of them a run answered right; :class:`NoPairs` where its file does not say."""
    file, row = predictions_file(one.file), one.row
    try:
        stored = read_json(file)
    except FileNotFoundError:
        raise NoPairs(f"{file} is not there") from None
    except (OSError, ValueError) as error:
        raise NoPairs(f"{file} cannot be read ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(stored, dict):
        raise NoPairs(f"{file} holds no labels and predictions")
    lists = [stored.get(name) for name in ("labels", "predictions")]
    if not all(isinstance(values, list) and all(_is_class(value) for value in values) for values in lists):
        raise NoPairs(f"labels or predictions in {file} are no class indices")
    labels, predictions = (np.array(values, dtype=np.int64) for values in lists)
    if len(labels) != len(predictions) or not len(labels):
        raise NoPairs(f"{file} holds {len(labels)} labels and {len(predictions)} predictions")
    if stored.get("split") != row.split or stored.get("sha256") is None or stored["sha256"] != row.test_sha256:
        raise NoPairs(f"{file} is not of the images that {one.file.name} beside it was scored on")
    right = labels == predictions
    if abs(float(right.mean()) - row.value) > 1e-6:
        raise NoPairs(f"{file} gives {right.mean():.4f}, {one.file.name} beside it says {row.value:.4f}")
    return labels, right


def _is_class(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _listed(draws: Iterable[tuple[int, int]]) -> str:
    return ", ".join(map(draw_text, sorted(draws)))
