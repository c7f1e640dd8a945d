"""From the options of a sweep to its runs, each with an address that is made of what it does."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from typing import Any

from pyra.errors import ConfigError, did_you_mean
from pyra.records import option, type_problems
from pyra.tasks.options import MERGING, METHODS, RunOptions
from pyra.tasks.protocols.options import combinations
from pyra.tasks.results import rate_text

EXECUTORS = ("local", "ray", "slurm")
MOST_RUNS = 100_000
_LARGEST = 10**6
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(kw_only=True)
class SweepOptions(RunOptions):
    """Modifications against ``RunOptions``: lists where one run has a value, and where the runs take place."""

    method: str = option("lora,tome,pyra", "methods, a comma list")
    rate: float | str | None = option(
        None, "rates for tome and pyra: a list 0.3,0.5 or first:last:step as in 0:0.8:0.1; with --elastic one training"
    )
    grid: str | None = option(None, "values of other options, every combination: rank=4:8,lr=1e-3:3e-3")
    seeds: int = option(1, "runs of each point, with --seed, --seed + 1, ...")
    executor: str = option("local", "where runs take place", choices=EXECUTORS)
    workers: int | None = option(None, "runs at a time (local: one for each GPU, or one)")
    address: str | None = option(None, "of a Ray cluster; without it Ray is started on this machine")
    cpus: float = option(1.0, "CPUs that Ray or Slurm gives a run")
    gpus: float = option(0.0, "GPUs that Ray or Slurm gives a run")
    retry: bool = option(False, "try what failed again")
    dry_run: bool = option(False, "list the runs with what they will take, and end")
    budget: str | None = option(None, "stop after so long, such as 2h or 90m; the same line later goes on")
    output: str = option("sweeps/latest", "folder of the sweep; what is finished there is kept")
    overwrite: bool = option(False, "remove the sweep in --output and start again")
    resume: bool = field(default=True, init=False)  # a sweep always goes on with what is there

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        if self.task is None and self.data is None:
            self.task = "demo"
        if isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool):
            self.rate = str(self.rate)
        if isinstance(self.track, list):
            self.track = tuple(self.track)
        problems = type_problems(type(self), {one.name: getattr(self, one.name) for one in fields(self)})
        if problems:
            raise ConfigError("; ".join(problems))
        for name in ("seeds", "workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 10_000:
                problems.append(f"--{name} must be a positive number, got {value}")
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < 10_000:
                problems.append(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.executor not in EXECUTORS:
            problems.append(f"--executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        if self.address is not None and self.executor != "ray":
            problems.append("--address goes with --executor ray")
        if self.executor == "local" and (self.cpus != 1 or self.gpus):
            problems.append(
                "--cpus and --gpus go with --executor ray or slurm: here each GPU is one run's, or see --workers"
            )
        if not self.output.strip():
            problems.append("--output is empty; give a folder")
        for question in (self.budget_seconds, self.methods, self.axis, lambda: next(iter(self._made()), None)):
            try:
                question()
            except ConfigError as error:
                problems.append(str(error))
                break  # what follows asks the same
        if problems:
            raise ConfigError("; ".join(problems))

    def methods(self) -> list[str]:
        """Return the methods.

        Raises:
            ConfigError: for none, one twice, or one that does not exist.
        """
        names = [name.strip() for name in self.method.split(",") if name.strip()]
        if not names:
            raise ConfigError("--method names no method: give a list such as lora,tome,pyra")
        for name in names:
            if name not in METHODS:
                raise ConfigError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; one of {', '.join(METHODS)}")
        _once("--method", names)
        return names

    def axis(self) -> list[float]:
        """Return the rates, rising; none without methods that merge.

        Raises:
            ConfigError: for rates that are no numbers in [0, 1), a rate twice, an empty range, or rates without use.
        """
        merging = [name for name in self.methods() if name in MERGING]
        for name in ("elastic", "distill"):
            if getattr(self, name) and "pyra" not in merging:
                raise ConfigError(f"--{name} is for pyra, and --method does not name it")
        if self.elastic and self.rate is None:
            raise ConfigError("--elastic needs --rate, with at least two rates: one training serves all of them")
        if self.rate is None:
            if merging and self.schedule is None:
                raise ConfigError(f"--method {','.join(merging)} needs --rate, such as 0.3,0.5,0.7 or 0:0.8:0.1")
            return []
        if not merging:
            raise ConfigError("--rate is for tome and pyra, and --method names neither")
        if self.schedule is not None:
            raise ConfigError("give --rate or --schedule, not both")
        found = [rate for part in str(self.rate).split(",") for rate in _range(part.strip())]
        wrong = [rate for rate in found if not 0 <= rate < 1]
        if wrong:
            raise ConfigError(f"--rate must lie in [0, 1), got {', '.join(map(rate_text, wrong))}")
        _once("--rate", [rate_text(rate) for rate in found])
        if self.elastic and len(found) < 2:
            raise ConfigError("--elastic needs at least two rates: one training serves all of them")
        return sorted(found)

    def budget_seconds(self) -> float | None:
        """Return the budget in seconds, or None.

        Raises:
            ConfigError: for what is no duration.
        """
        if self.budget is None:
            return None
        found = _DURATION.fullmatch(self.budget.strip().lower())
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
        seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        if not seconds:
            raise ConfigError(f"--budget must be a duration such as 2h, 90m or 1h30m, got {self.budget!r}")
        return seconds

    def runs(self) -> list[Planned]:
        """Return every run of the sweep as they are begun: a seed after the other, so that a cut leaves whole curves.

        Raises:
            ConfigError: for options that do not go together in some run, and for grids that hold a run twice.
        """
        made = list(self._made())
        names = [planned.name for planned in made]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"the grid holds a run twice ({twice}): take out what overlaps")
        return made

    def _made(self) -> Iterator[Planned]:
        methods, axis = self.methods(), self.axis()
        changes = combinations(self.grid, "--grid")
        points = len(changes) * sum(max(len(axis), 1) if name in MERGING else 1 for name in methods)
        if points * self.seeds > MOST_RUNS:
            raise ConfigError(f"the grid holds {points * self.seeds} runs, more than {MOST_RUNS}: make it coarser")
        for seed in range(self.seed, self.seed + self.seeds):
            for change in changes:
                for method in methods:
                    for own in self._of_method(method, axis):
                        yield self._planned(seed, axis, {"method": method, **own, **change})

    def _of_method(self, method: str, axis: list[float]) -> list[dict[str, Any]]:
        if method not in MERGING:
            return [{"rate": None, "schedule": None, "elastic": False, "distill": False, "peft": None,
                     "scaled_gates": False}]  # fmt: skip
        gates = {"scaled_gates": self.scaled_gates and method == "pyra"}
        if self.elastic and method == "pyra":
            return [{"rate": f"{rate_text(axis[0])}:{rate_text(axis[-1])}", **gates}]
        plain = {"elastic": False, "distill": False, **gates}
        # At rate 0 nothing merges: it is what lora is, which takes the same place on the axis.
        known = "lora" in self.methods() and self.peft in (None, "lora")
        if not axis:
            return [{"rate": None, **plain}]
        return [{"rate": rate_text(rate), **plain} for rate in axis if rate or not known]

    def _planned(self, seed: int, axis: list[float], changes: dict[str, Any]) -> Planned:
        values = {one.name: getattr(self, one.name) for one in fields(RunOptions)}
        kept = {"overwrite": False, "resume": True, "output": self.output, "seed": seed}
        options = RunOptions(**{**values, **kept, **changes})
        return Planned(options, tuple(axis) if options.elastic else ())


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        options: of the run; their output is that of the sweep.
        rates: at which an elastic run is scored; none for other runs.
    """

    options: RunOptions
    rates: tuple[float, ...] = ()

    @property
    def address(self) -> str:
        """Twelve hexadecimal digits of what the run does; neither of where nor of when."""
        from pyra.tasks.resuming import FREE  # with torch, which wrong options need not wait for
        from pyra.tasks.runs import stored_options

        stored = stored_options(self.options)
        does = {name: value for name, value in stored.items() if name not in FREE}
        text = json.dumps([does, self.rates], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of its folder: what a person looks for, and the address."""
        rate = "" if self.options.rate is None else f"-{str(self.options.rate).replace(':', '-')}"
        return f"{self.options.label}{rate}-seed{self.options.seed}-{self.address}"


def _range(text: str) -> list[float]:
    """Return the numbers of ``0.3`` or ``0:0.8:0.1``, the last one included where the steps reach it."""
    try:
        parts = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        raise ConfigError(f"--rate {text!r} is no number and no first:last:step") from None
    if len(parts) not in (1, 3) or not all(part.is_finite() for part in parts):
        hint = f", such as {text}:0.1" if len(parts) == 2 else ""
        raise ConfigError(f"--rate {text!r} is no number and no first:last:step{hint}")
    if max(map(abs, parts)) > _LARGEST:  # and no arithmetic with a million digits
        raise ConfigError(f"--rate must lie in [0, 1), got {text[:40]}")
    if len(parts) == 1:
        return [abs(float(parts[0])) if not parts[0] else float(parts[0])]
    first, last, step = parts
    if 0 < step < 1 / _LARGEST:
        raise ConfigError(f"--rate {text[:40]} holds too many rates: take a larger step")
    if step <= 0 or last < first:
        raise ConfigError(f"--rate {text} is empty: it starts at the first, ends at the last, and the step is above 0")
    count = math.floor((last - first) / step) + 1
    if count > 1000:
        raise ConfigError(f"--rate {text} holds {count} rates: take a larger step")
    return [float(first + number * step) for number in range(count)]


def _once(flag: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{flag} holds {', '.join(twice)} twice: its parts overlap")
