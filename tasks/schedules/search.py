"""A schedule by search: few numbers make a shape, Optuna proposes them, a score on validation images decides.

The shapes hold those of the rate solver: a layer's step is ``scale * weight * (share of the tokens left) ** bend``,
with weights that lie on a line through three points over the depth, and the scale that the budget asks for. So every
candidate costs the same and differs in where it merges. Optuna is an optional dependency (extra ``sweeps``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pyra.errors import ConfigError, DataError
from pyra.files import atomic_path
from pyra.matching import removable
from pyra.tasks.schedules.costs import Costs, total
from pyra.tasks.schedules.latency import UnreachableError

Score = Callable[[list[int]], float]
BEND, LOG_WEIGHT = (0.0, 4.0), (-1.5, 1.5)
"""Ranges that are searched; a weight between exp(-1.5) and exp(1.5)."""

_STEPS = 50
_STAGGER = 1e-6  # as in pyra.schedule: equal steps do not all change their rounding at once
_NAME = "schedule"


@dataclass(frozen=True)
class Shape:
    """How merging is spread over the depth.

    Attributes:
        bend: power of the share of tokens left; 0 for steps that do not depend on it, 1 for a constant share.
        early, middle, late: logarithms of the weights of the first, the middle and the last layer.
    """

    bend: float = 0.0
    early: float = 0.0
    middle: float = 0.0
    late: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A candidate and its score; ``shape`` is None for a schedule that the search started from."""

    schedule: list[int]
    score: float
    shape: Shape | None


@dataclass(frozen=True)
class Searched:
    """The best candidate, the first of equals, and all of them in order."""

    best: Trial
    trials: list[Trial]


def schedule_of_shape(shape: Shape, costs: Costs, budget: float) -> list[int]:
    """Return the schedule of a shape whose cost is within a budget, with the smallest scale that does it.

    Raises:
        UnreachableError: where none is.
    """
    high = 1.0
    while total(costs, _scaled(shape, costs, high)) > budget:
        high *= 2
        if high > 2.0**40:
            raise UnreachableError(total(costs, _scaled(shape, costs, high)), budget)
    low = 0.0
    if total(costs, _scaled(shape, costs, low)) <= budget:
        return _scaled(shape, costs, low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = total(costs, _scaled(shape, costs, middle)) <= budget
        low, high = (low, middle) if enough else (middle, high)
    return _scaled(shape, costs, high)


def _scaled(shape: Shape, costs: Costs, scale: float) -> list[int]:
    sizes = costs.geometry
    free = sizes.tokens - sizes.prefix_tokens
    knots = [shape.early, shape.middle, shape.late]
    weights = np.exp(np.interp(np.linspace(0, 2, sizes.depth), [0, 1, 2], knots))
    schedule, exact, tokens = [], float(free), sizes.tokens
    for block, weight in enumerate(weights, start=1):
        step = scale * float(weight) * (exact / free) ** shape.bend
        exact = max(exact - step, exact / 2)
        removed = tokens - sizes.prefix_tokens - round(exact - _STAGGER * block**2)
        removed = max(0, min(removed, removable(tokens, sizes.prefix_tokens)))
        schedule.append(removed)
        tokens -= removed
    return schedule


def search_schedule(
    score: Score,
    costs: Costs,
    budget: float,
    *,
    trials: int,
    storage: str | Path,
    seed: int = 0,
    start: Sequence[list[int]] = (),
    higher_is_better: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Searched:
    """Search for the schedule with the best score within a budget.

    What was tried lies in ``storage``, a journal of Optuna: a search that is cut off goes on there, to the same end,
    and one that asks for more trials adds them.

    Args:
        score: of a schedule, the same each time; never of a test split.
        costs: of the model's layers.
        budget: in the unit of the costs.
        trials: candidates, beside those in ``start``.
        storage: file of the journal.
        seed: of the proposals.
        start: schedules within the budget that are scored first, such as the solver's.
        higher_is_better: whether the best score is the highest.
        settings: JSON values that say what is searched, and for which target; a journal of another search is refused.

    Raises:
        ConfigError: where Optuna is missing, or fewer than one trial is asked for.
        DataError: where the journal is of another search, or none.
        UnreachableError: where no schedule is within the budget.
    """
    optuna = _optuna()
    if trials < 1:
        raise ConfigError(f"--trials must be at least 1, got {trials}")
    schedule_of_shape(Shape(), costs, budget)  # unreachable is told before anything is written
    asked = {"seed": seed, **(settings or {})}
    study = _study(optuna, Path(storage), higher_is_better, asked)
    known: dict[tuple[int, ...], float] = {}

    def scored(schedule: list[int]) -> float:
        if tuple(schedule) not in known:
            known[tuple(schedule)] = float(score(schedule))
        return known[tuple(schedule)]

    state = optuna.trial.TrialState
    for each in study.get_trials(deepcopy=False):
        if each.state == state.COMPLETE:
            known[tuple(each.user_attrs["schedule"])] = each.value
        elif each.state == state.RUNNING:  # cut off
            study.tell(each.number, state=state.FAIL)
    starting = [tuple(map(int, key.split(","))) for key in study.user_attrs.get("scored", {})]
    known |= {key: float(study.user_attrs["scored"][_key(key)]) for key in starting}
    first = [Trial(list(one), scored(list(one)), None) for one in start]
    study.set_user_attr("scored", {_key(trial.schedule): trial.score for trial in first})
    done = sum(each.state == state.COMPLETE for each in study.get_trials(deepcopy=False))
    for number in tqdm(range(done, trials), desc="searching", unit="trial", leave=False, disable=None):
        # A sampler of its own for each trial: one that is made anew after a stop would repeat its proposals.
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number, n_startup_trials=min(8, trials // 2))
        trial = study.ask()
        ranges = {"bend": BEND, "early": LOG_WEIGHT, "middle": LOG_WEIGHT, "late": LOG_WEIGHT}
        shape = Shape(**{name: trial.suggest_float(name, *values) for name, values in ranges.items()})
        schedule = schedule_of_shape(shape, costs, budget)
        trial.set_user_attr("schedule", schedule)
        study.tell(trial, scored(schedule))
    tried = [
        Trial(each.user_attrs["schedule"], each.value, Shape(**each.params))
        for each in study.get_trials(deepcopy=False, states=(state.COMPLETE,))
    ]
    every = [*first, *tried]
    sign = 1 if higher_is_better else -1
    return Searched(max(every, key=lambda trial: sign * trial.score), every)


def _key(schedule: Sequence[int]) -> str:
    return ",".join(map(str, schedule))


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("--search needs optuna: pip install 'pyra-adapt[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _mend(file: Path) -> None:
    """Cut a line off that was not written to its end, as a process was killed; the trials before it stay.

    Raises:
        DataError: for a file that is no journal of Optuna.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        sound = all(isinstance(one, dict) and type(one.get("op_code")) is int for one in entries)
    except ValueError:
        sound = False
    if not sound or (content and not whole):
        raise DataError(f"{file} is no journal of a search: remove it")
    if whole != content:
        with atomic_path(file) as temporary:
            temporary.write_bytes(whole)


def _study(optuna: Any, file: Path, higher_is_better: bool, asked: dict[str, Any]) -> Any:
    file.parent.mkdir(parents=True, exist_ok=True)
    _mend(file)
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=_NAME,
            direction="maximize" if higher_is_better else "minimize",
            load_if_exists=True,
        )
        found = study.user_attrs.get("settings")
    except (ValueError, KeyError, TypeError, AssertionError, IndexError) as error:  # whatever it makes of odd entries
        raise DataError(f"{file} is no journal of a search ({' '.join(str(error).split())}): remove it") from None
    if found is not None and found != asked:
        changed = sorted(name for name in {*found, *asked} if found.get(name) != asked.get(name))
        raise DataError(
            f"{file} holds the trials of another search ({', '.join(changed)} differ): remove it, or give another "
            "--output"
        )
    if found is None:
        study.set_user_attr("settings", asked)
    return study
