"""A schedule for a latency: solved on measured costs of the layers, then checked on the whole model.

The least merging that meets the target, of the same family of shapes that a rate is solved for
(:func:`pyra.schedule.schedule_at`). The sum of the layers misses what caches and launches do in the whole model, so the
wrapped model is timed against the plain one, in turns, and where the prediction was off the target is corrected by that
factor, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyra.backbones import wrap
from pyra.config import PyraConfig
from pyra.cost import geometry_macs
from pyra.errors import ScheduleError
from pyra.schedule import MAX_PRESSURE, schedule_at
from pyra.tasks.schedules.costs import Costs, MeasuredCosts, private_copy, total
from pyra.tasks.timing import forward, spreads

TOLERANCE = 0.03
"""Share by which a check may differ from what was predicted or asked for: what turns on a shared machine vary by."""

Solver = Callable[[MeasuredCosts, float], list[int]]
_GRID = 600  # pressures looked at: less than a token in a block apart for a few hundred tokens
_REFINED = 20


@dataclass(frozen=True)
class LatencyTarget:
    """Seconds of one forward of a batch, or how many times faster than the plain model; one of the two."""

    seconds: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        """Raise :class:`ScheduleError` unless exactly one is given, a positive number."""
        given = [value for value in (self.seconds, self.speedup) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ScheduleError(
                f"give a latency or a speed-up, a positive number, got {self.seconds!r} and {self.speedup!r}"
            )

    def budget(self, plain: float) -> float:
        """Return the seconds to stay within where the plain model takes ``plain``."""
        if self.seconds is not None:
            return self.seconds
        assert self.speedup is not None
        return plain / self.speedup

    def said(self) -> str:
        """Return the target in words."""
        return f"{_ms(self.seconds)}" if self.seconds is not None else f"a speed-up of {self.speedup:.4g}"


@dataclass(frozen=True)
class Check:
    """A schedule on the whole model.

    Attributes:
        schedule: tokens removed in each block.
        predicted: seconds of a forward, from the layers' costs.
        predicted_speedup: over the plain model, from the same costs.
        measured: seconds of a forward of the wrapped model.
        plain: seconds of the plain model, in turns with it.
    """

    schedule: list[int]
    predicted: float
    predicted_speedup: float
    measured: float
    plain: float

    @property
    def speedup(self) -> float:
        """How many times faster than the plain model, measured."""
        return self.plain / self.measured

    def excess(self, target: LatencyTarget) -> float:
        """Return the measured time over what it should be at most."""
        return self.measured / target.budget(self.plain)

    def error(self, target: LatencyTarget) -> float:
        """Return the measured over the predicted time; for a speed-up as shares of the plain model's, which drifts."""
        return self.measured / self.predicted if target.speedup is None else self.predicted_speedup / self.speedup


@dataclass(frozen=True)
class TimedSchedule:
    """The schedule that was found, and what it rests on.

    Attributes:
        target: what was asked for.
        checks: the schedule as first solved, and the corrected one where there is one.
        chosen: the check of the schedule to take: of those that meet the target the least merging, else the fastest.
        costs: of the layers.
    """

    target: LatencyTarget
    checks: list[Check]
    chosen: Check
    costs: MeasuredCosts

    @property
    def schedule(self) -> list[int]:
        """Tokens to remove in each block."""
        return self.chosen.schedule

    @property
    def met(self) -> bool:
        """Whether the measured time is within the target, but for :data:`TOLERANCE`."""
        return self.chosen.excess(self.target) <= 1 + TOLERANCE


def schedule_within(costs: Costs, budget: float) -> list[int]:
    """Return the least merging of the family of :func:`pyra.schedule.schedule_at` whose cost is within a budget.

    Unlike MACs, measured costs need not fall with every token that merges: matching costs as well. So the pressures are
    looked at in turn, from none on.

    Raises:
        UnreachableError: where none is.
    """
    sizes = costs.geometry
    best = float("inf")
    below = 0.0
    for point in range(_GRID + 1):
        pressure = MAX_PRESSURE * point / _GRID
        cost = total(costs, schedule_at(sizes, pressure))
        if cost <= budget:
            return _refined(costs, budget, below, pressure)
        best, below = min(best, cost), pressure
    raise UnreachableError(best, budget)


def _refined(costs: Costs, budget: float, low: float, high: float) -> list[int]:
    """Bisect between a pressure that is too low and one that is enough."""
    for _ in range(_REFINED):
        middle = (low + high) / 2
        enough = total(costs, schedule_at(costs.geometry, middle)) <= budget
        low, high = (low, middle) if enough else (middle, high)
    return schedule_at(costs.geometry, high)


class UnreachableError(ScheduleError):
    """A budget that no schedule is within; ``best`` is the lowest cost there is."""

    def __init__(self, best: float, budget: float) -> None:
        super().__init__(f"the best that merging reaches is a cost of {best:.6g}, asked for {budget:.6g}")
        self.best, self.budget = best, budget


def latency_schedule(
    model: nn.Module,
    images: Tensor,
    target: LatencyTarget,
    config: PyraConfig,
    *,
    solve: Solver = schedule_within,
    costs: MeasuredCosts,
    rounds: int = 9,
) -> TimedSchedule:
    """Find the schedule with which a model meets a latency on this device, and check it.

    Args:
        model: a supported backbone; it stays as it is.
        images: [B, 3, H, W] on its device: what one forward gets.
        target: what to reach.
        config: how tokens are merged; its rate or schedule is not read.
        solve: from costs and seconds to a schedule; raises :class:`UnreachableError`.
        costs: of the layers, from :func:`pyra.tasks.schedules.costs.measure_costs` with the same images and config.
        rounds: timed forwards of each model in a check; the lower fifth counts, as in the costs.

    Raises:
        ScheduleError: where merging cannot reach the target; the message names the best it can.
    """
    budget = target.budget(costs.plain)
    checks = [check(model, images, _solved(solve, costs, budget, target, 1.0), config, costs, rounds)]
    error = checks[0].error(target)
    if abs(error - 1) > TOLERANCE:
        corrected = _solved(solve, costs, budget / error, target, error)
        if corrected != checks[0].schedule:
            checks.append(check(model, images, corrected, config, costs, rounds))
    return TimedSchedule(target, checks, _choose(checks, target, costs), costs)


def _choose(checks: Sequence[Check], target: LatencyTarget, costs: Costs) -> Check:
    good = [each for each in checks if each.excess(target) <= 1 + TOLERANCE]
    if good:
        return max(good, key=lambda each: geometry_macs(costs.geometry, each.schedule))
    return min(checks, key=lambda each: each.excess(target))


def _solved(solve: Solver, costs: MeasuredCosts, budget: float, target: LatencyTarget, error: float) -> list[int]:
    try:
        return solve(costs, budget)
    except UnreachableError as unreachable:
        best = unreachable.best * error
        raise ScheduleError(
            f"merging brings a forward of {costs.batch_size} image{'s' if costs.batch_size > 1 else ''} from "
            f"{_ms(costs.plain)} to {_ms(best)} at best on this device (a speed-up of {costs.plain / best:.2f}), asked "
            f"for {target.said()}"
        ) from None


def check(
    model: nn.Module,
    images: Tensor,
    schedule: list[int],
    config: PyraConfig,
    costs: MeasuredCosts,
    rounds: int = 9,
) -> Check:
    """Time a whole model with a schedule against the plain one, in turns.

    Arguments are those of :func:`latency_schedule`.
    """
    merging = replace(config, schedule=list(schedule), rate=None, rate_range=None)
    models = {"plain": private_copy(model), "merged": wrap(private_copy(model), merging)}
    jobs = {name: forward(each, images) for name, each in models.items()}
    seconds = {name: spread.p20 for name, spread in spreads(jobs, rounds, device=images.device).items()}
    predicted = total(costs, schedule)
    return Check(list(schedule), predicted, costs.plain / predicted, seconds["merged"], seconds["plain"])


def _ms(seconds: float | None) -> str:
    assert seconds is not None
    return f"{1e3 * seconds:.3g} ms"
