"""Which point of a sweep to take: the fastest one that loses little, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError, DataError
from pyra.tasks.comparison import paired_difference, probability_at_least
from pyra.tasks.metrics import METRICS
from pyra.tasks.reports.collect import collect, is_rate
from pyra.tasks.reports.comparable import warnings
from pyra.tasks.reports.formats import Table, clean
from pyra.tasks.reports.groups import Group, differences, draw_text, group, seeds_text
from pyra.tasks.reports.paired import NoPairs, paired_answers
from pyra.tasks.reports.report import filtered, filters, skipped_note
from pyra.tasks.reports.table import macs_unit, metric_name, number_text, value_text
from pyra.tasks.results import PROTOCOLS
from pyra.tasks.sweeps.commands import commands
from pyra.tasks.sweeps.points import Point, plain_speeds, point, speed_title, unsteady

BY = ("speed", "macs")
SURE = 0.95
_FEW_SEEDS, _TRIED = 3, 10


@dataclass(frozen=True)
class Confidence:
    """The drop in percentage points with its 95 % interval, and the probability that it is within the limit."""

    drop: float
    low: float
    high: float
    probability: float
    seeds: list[str]
    images: int


@dataclass(frozen=True)
class Choice:
    """A point beside the reference; ``drop`` is in percentage points, negative where the point is better."""

    role: str
    point: Point
    drop: float
    confidence: Confidence | None = None


@dataclass(frozen=True)
class Recommendation:
    """What to take, if anything qualifies, else what comes nearest; the notes say what makes it uncertain.

    Attributes:
        by: what was ranked by, ``images/s``, ``speed-up`` or ``MACs``.
        max_drop: the limit in percentage points.
        reference: the best uncompressed method, or the best of all where there is none.
        chosen: the fastest point within the limit.
        surest: the fastest one that is within it with a probability of :data:`SURE`, where that is another point.
        nearest: where nothing qualifies, the point that loses least.
    """

    by: str
    max_drop: float
    reference: Point
    chosen: Choice | None
    surest: Choice | None
    nearest: Choice | None
    notes: list[str] = field(default_factory=list)


def recommend_from(
    folder: str | Path, max_drop: float = 1.0, by: str = "speed", where: Sequence[str] = ()
) -> Recommendation:
    """Read the runs below a folder and choose among them.

    Args:
        folder: with runs at any depth.
        max_drop: percentage points of accuracy that may be lost.
        by: ``speed`` (images/s, or speed-up where devices differ) or ``macs``.
        where: ``name=value`` for each value that is wanted, as of :func:`pyra.tasks.reports.report.report`.

    Raises:
        DataError: no result, or a folder that is not there.
        ConfigError: runs that cannot be compared, too few of them, none with a measured speed, or a wrong option.
    """
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ConfigError(f"--max-drop is a number of percentage points from 0 up, got {max_drop}")
    if by not in BY:
        raise ConfigError(f"--by {by!r}: one of {', '.join(BY)}")
    wanted = filters(where)
    collection = collect([folder], is_rate)
    if not collection.found:
        more = "; ".join(["", *skipped_note(collection)])
        raise DataError(f"no finished run below {folder}{more}: make some with `pyra train --output {folder}/a`")
    groups, notes = group(filtered(collection.found, wanted))
    points = [point(one, told) for one, told in zip(groups, differences(groups), strict=True)]
    found = recommend(points, max_drop, by)
    return replace(found, notes=[*found.notes, *warnings(groups), *notes, *skipped_note(collection)])


def recommend(points: Sequence[Point], max_drop: float, by: str = "speed") -> Recommendation:
    """Choose the fastest point within ``max_drop`` percentage points of the best uncompressed one.

    Points are judged by their means; where the runs kept their answers, a paired bootstrap over test images and seeds
    says how sure that is.

    Raises:
        ConfigError: as of :func:`recommend_from`.
    """
    _refuse_what_cannot_be_compared(points)
    ranked_by, rank, notes = _ranking(points, by)
    plain = [one for one in points if not one.compressed]
    reference = max(plain or points, key=lambda one: one.group.mean)
    if not plain:
        notes.append(f"no run leaves its tokens unmerged: drops are against the best of all, {reference.name}")
    slower = rank(reference)
    candidates = [one for one in points if (one.compressed or not plain) and rank(one) is not None]
    if not candidates:
        raise ConfigError("no run that merges tokens has been measured: nothing to recommend; train some with --rate")
    faster = [one for one in candidates if slower is None or one is reference or (rank(one) or 0) > slower]
    within = [one for one in faster if _drop(reference, one) <= max_drop + 1e-9]
    within.sort(key=lambda one: (-(rank(one) or 0), -one.group.mean))
    chosen = surest = nearest = None
    if within:
        chosen, more = _choice("recommended", reference, within[0], max_drop)
        notes += more
        if chosen.confidence is not None and chosen.confidence.probability < SURE:
            surest = _surest(reference, within[1:_TRIED], max_drop)
    else:
        nearest, more = _choice(
            "nearest", reference, min(faster or candidates, key=lambda one: _drop(reference, one)), max_drop
        )
        notes += more
        if not faster:
            notes.append(f"no point that merges tokens is faster than {reference.name} (by {ranked_by})")
    shown = chosen or nearest
    for one in (reference, *([] if shown is None or shown.point is reference else [shown.point])):
        least = one.row.majority_value
        if least is not None and one.group.mean <= least + 1e-9:
            value = value_text(one.row.metric, least)
            notes.append(f"{one.name} is no better than always answering the most frequent class ({value})")
    if shown is not None and shown.point.row.protocol == "published":
        notes.append(f"{shown.point.name} was {PROTOCOLS['published']}: its accuracy is optimistic")
    notes.append("the point was chosen on the images that it is scored on: confirm it on others")
    return Recommendation(ranked_by, max_drop, reference, chosen, surest, nearest, notes)


def _refuse_what_cannot_be_compared(points: Sequence[Point]) -> None:
    contexts = list(dict.fromkeys(one.context for one in points))
    if len(contexts) > 1:
        tasks, splits, metrics = (sorted({context[place] for context in contexts}) for place in range(3))
        name, values = next((n, v) for n, v in (("task", tasks), ("metric", metrics), ("split", splits)) if len(v) > 1)
        listed = clean("; ".join(f"{task} ({split}, {metric})" for task, split, metric in contexts))
        raise ConfigError(
            f"the runs are of several tasks or metrics ({listed}): choose one, such as --where {name}="
            f"{clean(values[0])}"
        )
    row = points[0].row
    if row.metric not in METRICS or not row.higher_is_better:
        raise ConfigError(
            f"--max-drop counts percentage points of {' or '.join(METRICS)}, the metric of these runs is {row.metric}: "
            "use pyra results"
        )
    for name, what in (("test_sha256", "images"), ("task_version", "versions of the task")):
        values = sorted({str(getattr(one.row, name)) for one in points if getattr(one.row, name) is not None})
        if len(values) > 1:
            listed = ", ".join(value[:12] for value in values)
            raise ConfigError(
                f"the runs were scored on different {what} ({listed}): give a folder with runs of one, or choose them "
                "with --where"
            )
    if len(points) == 1:
        one = points[0]
        raise ConfigError(
            f"there is one point only ({one.name}, seeds {seeds_text(one.group)}), nothing to choose from: train other "
            "methods or rates into the folder"
        )


def _ranking(points: Sequence[Point], by: str) -> tuple[str, Callable[[Point], float | None], list[str]]:
    """Return what is ranked by, as people call it, the rank of a point (higher is better), and what to know."""
    if by == "macs":
        return "MACs", lambda one: -one.macs, []
    if all(one.speed is None and one.speedup is None for one in points):
        raise ConfigError("no run has a measured speed: rank by the cost that is always known with --by macs")
    places = {place for one in points if one.row.images_per_second is not None for place in one.group.devices()}
    notes: list[str] = []
    busy = unsteady(points)
    if busy is not None:
        notes.append(busy)
    if len(plain_speeds(points)) == 1 and all(one.speedup is not None for one in points):
        # The same order as that of speeds, and each was measured in turns with the one model that all share.
        name, of = "speed-up", lambda one: one.speedup
    elif len(places) == 1:
        name, of = speed_title(points), lambda one: one.speed
    else:
        listed = ", ".join(sorted(f"{device or 'unknown'} at batch {batch}" for device, batch in places))
        notes.append(
            f"speeds come from different devices or batches ({listed}): speed-ups are compared, each over the unmerged "
            "backbone on its own device; they need not hold on another one"
        )
        name, of = "speed-up", lambda one: one.speedup
    without = [one.name for one in points if one.compressed and of(one) is None]
    if without:
        notes.append(f"left out, without a measured {name}: {', '.join(dict.fromkeys(without))}")
    return name, of, notes


def _drop(reference: Point, one: Point) -> float:
    return 100 * (reference.group.mean - one.group.mean)


def _choice(role: str, reference: Point, one: Point, limit: float) -> tuple[Choice, list[str]]:
    """Return a point with its confidence, and what makes that little."""
    drop = _drop(reference, one)
    if one is reference:
        return Choice(role, one, 0.0), []
    try:
        found = confidence(one.group, reference.group, limit)
    except NoPairs as error:
        seeds = min(len(one.group.members), len(reference.group.members))
        return Choice(role, one, drop), [f"uncertain: no interval, because {error}", *_few_seeds(seeds)]
    notes = _few_seeds(len(found.seeds))
    fewest = min(len(one.group.members), len(reference.group.members))
    if len(found.seeds) < fewest:
        notes.append(f"the interval is over the seeds that both have: {', '.join(found.seeds)}")
    half = (found.high - found.low) / 2
    if half > limit and found.probability < SURE:
        notes.append(
            f"{found.images:,} images tell this drop to within ± {half:.1f} points only, the limit is {limit:g}: "
            "more test images or seeds would tell"
        )
    return Choice(role, one, drop, found), notes


def _few_seeds(count: int) -> list[str]:
    if count >= _FEW_SEEDS:
        return []
    what = "one seed says nothing" if count == 1 else f"{count} seeds say little"
    return [f"uncertain: {what} of how much another seed would change; train {_FEW_SEEDS} or more"]


def confidence(ours: Group, theirs: Group, limit: float) -> Confidence:
    """Return how much ``ours`` loses against ``theirs``, by a paired bootstrap over test images and seeds.

    Raises:
        NoPairs: with the reason.
    """
    pairs = paired_answers(ours, theirs)
    found = paired_difference(pairs.ours, pairs.theirs, draws=pairs.times)
    probability = probability_at_least(pairs.ours, pairs.theirs, -limit / 100, draws=pairs.times)
    drop, low, high = (-100 * value for value in (found.difference, found.high, found.low))
    return Confidence(drop, low, high, probability, [draw_text(draw) for draw in pairs.draws], pairs.images)


def _surest(reference: Point, others: Sequence[Point], limit: float) -> Choice | None:
    for one in others:
        made, _ = _choice("surest", reference, one, limit)
        if made.confidence is not None and made.confidence.probability >= SURE:
            return made
    return None


def _shown(found: Recommendation) -> list[Choice]:
    return [one for one in (found.chosen, found.surest, found.nearest) if one is not None]


def verdict(found: Recommendation) -> str:
    """Return the answer as one sentence."""
    reference = found.reference.name
    limit = f"{found.max_drop:g} point" + "s" * (found.max_drop != 1)
    if found.chosen is None:
        assert found.nearest is not None
        one = found.nearest
        return f"nothing qualifies: the nearest, {one.point.name}, is {_below(one.drop)} {reference} ({limit} allowed)"
    one, sure = found.chosen, found.chosen.confidence
    if one.point is found.reference:
        return f"{one.point.name}: the best of all is also the fastest within {limit} of it"
    if sure is None:
        how = "how sure that is cannot be told"
    elif sure.probability >= SURE:
        how = f"within {limit} with a probability of {_share(sure.probability)}"
    else:
        how = f"uncertain: within {limit} with a probability of {_share(sure.probability)} only"
    return f"{one.point.name}: {_below(one.drop)} {reference}; {how}"


def _below(drop: float) -> str:
    return f"{abs(drop):.2f} points {'above' if drop < -0.005 else 'below'}"


def _signed(number: float) -> str:
    return f"{round(number, 2) + 0.0:+.2f}"  # no -0.00


def _share(probability: float) -> str:
    return "over 0.99" if probability > 0.99 else "under 0.01" if probability < 0.01 else f"{probability:.2f}"


def recommendation_table(found: Recommendation) -> Table:
    """Return the reference and the points, with drops in percentage points."""
    shown = [Choice("reference", found.reference, 0.0), *_shown(found)]
    unit, size = macs_unit([one.point.row for one in shown])
    headers = [
        "", "method", "rate", metric_name(found.reference.row.metric), "drop (points)", "95 % interval",
        f"P(drop ≤ {found.max_drop:g})", speed_title([one.point for one in shown]), "speed-up", f"MACs ({unit})",
        "seeds",
    ]  # fmt: skip
    lines = []
    for one in shown:
        row, of, sure = one.point.row, one.point.group, one.confidence
        method = f"{row.method} ({one.point.told})" if one.point.told else row.method
        lines.append([
            one.role, method, f"{row.rate:.2f}", value_text(row.metric, of.mean, of.deviation),
            "-" if one.role == "reference" else _signed(one.drop),
            "-" if sure is None else f"{_signed(sure.low)} to {_signed(sure.high)}",
            "-" if sure is None else _share(sure.probability), number_text(one.point.speed),
            "-" if one.point.speedup is None else f"{one.point.speedup:.2f}x", number_text(one.point.macs / size),
            seeds_text(of),
        ])  # fmt: skip
    return Table(headers, lines, left=2)


def record(found: Recommendation) -> dict[str, Any]:
    """Return all of it as JSON types; accuracies are fractions, drops percentage points."""

    def one(choice: Choice | None) -> dict[str, Any] | None:
        if choice is None:
            return None
        at, sure = choice.point, choice.confidence
        return {
            "method": at.row.method,
            "rate": at.row.rate,
            "value_mean": at.group.mean,
            "value_std": at.group.deviation,
            "seeds": at.group.seeds,
            "images_per_second": at.speed,
            "speedup": at.speedup,
            "macs": at.macs,
            "drop": choice.drop,
            "drop_low": sure and sure.low,
            "drop_high": sure and sure.high,
            "probability_within": sure and sure.probability,
            "compared_seeds": sure and sure.seeds,
            "compared_images": sure and sure.images,
            "run": str(at.run),
            "commands": {made.does: made.text for made in commands(at.row.unit, at.run, at.asked_rate)},
        }

    return {
        "task": found.reference.row.task,
        "metric": found.reference.row.metric,
        "by": found.by,
        "max_drop": found.max_drop,
        "qualifies": found.chosen is not None,
        "verdict": verdict(found),
        "reference": one(Choice("reference", found.reference, 0.0)),
        "recommended": one(found.chosen),
        "surest": one(found.surest),
        "nearest": one(found.nearest),
        "notes": found.notes,
    }
