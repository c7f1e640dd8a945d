"""Methods against one of them, image by image: the paired differences of a folder of results.

Each run says in ``predictions.json`` what it answered: ``labels`` and ``predictions`` (class indices, one an image),
``split`` and ``sha256`` of the images.
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
from pyra.tasks.comparison import Difference, paired_difference
from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.formats import Table
from pyra.tasks.reports.groups import Group, differences, draw_of, draw_text, shown
from pyra.tasks.reports.table import value_text
from pyra.tasks.results import PROTOCOLS, RESULT_FILE

PREDICTIONS = "predictions.json"
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


class _NoPairs(Exception):
    """Why two methods cannot be compared."""


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
        except _NoPairs as error:
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
            raise _NoPairs("there is no run of it on that task")
        wrong = [name for name in _CONTEXT if not any(_equal(one, other, name) for other in on_task)]
        raise _NoPairs(f"its runs there have another {' and '.join(wrong or _CONTEXT[-3:])}".replace("_", " "))
    for name in ("protocol", "rate"):
        closer = [other for other in same if shown(other, name) == shown(one, name)]
        same = closer or same
    if len(same) > 1:
        raise _NoPairs(f"{len(same)} rows of it differ in their settings: choose one with --where, or another folder")
    return same[0]


def _equal(one: Group, other: Group, name: str) -> bool:
    return bool(getattr(one.row, name) == getattr(other.row, name))


def _comparison(ours: Group, theirs: Group) -> Comparison:
    if ours.row.metric != "accuracy":
        raise _NoPairs(f"it takes answers that are right or wrong (accuracy), the metric is {ours.row.metric}")
    left, right = ({draw_of(member.row): member for member in side.members} for side in (ours, theirs))
    draws = sorted(left.keys() & right.keys())
    if not draws:
        raise _NoPairs(f"they share no seed ({_listed(left)} and {_listed(right)})")
    answers = [[_right(side[draw]) for draw in draws] for side in (left, right)]
    labels = [one[0] for side in answers for one in side]
    if not all(np.array_equal(labels[0], one) for one in labels[1:]):
        raise _NoPairs(f"the labels in their {PREDICTIONS} differ")
    images = len(labels[0])
    times = min(_DRAWS, max(_FEWEST_DRAWS, _DRAWN // (images * len(draws))))
    pairs = [[one[1].astype(np.float32) for one in side] for side in answers]
    return Comparison(ours, theirs, draws, images, paired_difference(pairs[0], pairs[1], draws=times))


def _right(one: Found) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return labels, and which of them a run answered right; :class:`_NoPairs` where its file does not say."""
    file, row = one.file.with_name(PREDICTIONS), one.row
    if one.file.name != RESULT_FILE:
        raise _NoPairs(f"{one.file} is an evaluation, which stores no answers")
    try:
        stored = read_json(file)
    except FileNotFoundError:
        raise _NoPairs(f"{file} is not there") from None
    except (OSError, ValueError) as error:
        raise _NoPairs(f"{file} cannot be read ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(stored, dict):
        raise _NoPairs(f"{file} holds no labels and predictions")
    lists = [stored.get(name) for name in ("labels", "predictions")]
    if not all(isinstance(values, list) and all(_is_class(value) for value in values) for values in lists):
        raise _NoPairs(f"labels or predictions in {file} are no class indices")
    labels, predictions = (np.array(values, dtype=np.int64) for values in lists)
    if len(labels) != len(predictions) or not len(labels):
        raise _NoPairs(f"{file} holds {len(labels)} labels and {len(predictions)} predictions")
    if stored.get("split") != row.split or stored.get("sha256") is None or stored["sha256"] != row.test_sha256:
        raise _NoPairs(f"{file} is not of the images that {one.file.name} beside it was scored on")
    right = labels == predictions
    if abs(float(right.mean()) - row.value) > 1e-6:
        raise _NoPairs(f"{file} gives {right.mean():.4f}, {one.file.name} beside it says {row.value:.4f}")
    return labels, right


def _is_class(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _listed(draws: Iterable[tuple[int, int]]) -> str:
    return ", ".join(map(draw_text, sorted(draws)))
