"""Options of an experiment: one run, or several of them by a protocol."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from dataclasses import dataclass, fields
from typing import Any

from pyra.errors import ConfigError, did_you_mean
from pyra.records import option
from pyra.tasks.options import RunOptions

PROTOCOLS = {
    "validation": "choose on the validation split, train again on training and validation images, test once",
    "published": "train on both and report the best epoch of the test split, as published code does: optimistic",
}
SEEDS = 3

_TUNED = ("rank", "dropout", "drop_path", "batch_size", "lr", "reactivation_lr", "head_lr", "layer_decay",
          "weight_decay", "ema", "mixup", "cutmix", "smoothing", "randaugment", "scaled_gates", "peft")  # fmt: skip
"""What a protocol may choose: nothing that changes the data or what a forward costs."""


@dataclass(kw_only=True)
class ExperimentOptions(RunOptions):
    """Modifications against ``RunOptions``: how many runs there are, and what is chosen how."""

    protocol: str | None = option(
        None, "how hyper-parameters and epoch are chosen: see above", choices=tuple(PROTOCOLS)
    )
    seeds: int | None = option(None, "runs, with --seed, --seed + 1, ... (3 with --protocol, else 1)")
    tune: str | None = option(
        None, "values for the protocol to choose from: lr=1e-3:3e-3,dropout=0:0.1 tries every combination"
    )
    patience: int | None = option(None, "while choosing, stop after so many epochs without a better validation score")
    baselines: bool = option(True, "with several runs, train a linear probe for the table, too")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        super().__post_init__()
        problems = []
        for name in ("seeds", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 10_000:
                problems.append(f"--{name} must be a positive number, got {value}")
        if self.tune is not None and self.protocol is None:
            problems.append("--tune goes with --protocol validation or published")
        if self.patience is not None and self.protocol != "validation":
            problems.append("--patience goes with --protocol validation: without it nothing says which epoch is better")
        if self.seed + self.number_of_runs() > 2**32:
            problems.append(f"--seed {self.seed} leaves no room for {self.seeds} seeds")
        try:
            self.candidates()
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("; ".join(problems))

    def number_of_runs(self) -> int:
        """Return how many seeds there are."""
        return self.seeds if self.seeds is not None else SEEDS if self.protocol is not None else 1

    def is_single(self) -> bool:
        """Whether this is one run, whose folder is ``--output`` itself."""
        return self.protocol is None and self.number_of_runs() == 1

    def candidates(self) -> list[dict[str, Any]]:
        """Return what the protocol chooses from: changed options, each a value of ``--tune``; nothing changed at least.

        Raises:
            ConfigError: for names that are no option of a run or cannot be chosen, and values that do not fit.
        """
        made = combinations(self.tune, "--tune")
        for changes in made:
            self.run(self.output, **changes)  # as a check
        return made

    def run(self, output: str, **changes: Any) -> RunOptions:
        """Return the options of one run of the experiment.

        Raises:
            ConfigError: for changes that do not fit.
        """
        values = {one.name: getattr(self, one.name) for one in fields(RunOptions)}
        return RunOptions(**{**values, "output": output, **changes})


def combinations(text: str | None, flag: str) -> list[dict[str, Any]]:
    """Return every combination of the values of options, ``lr=1e-3:3e-3,dropout=0:0.1``; for None that of nothing.

    Args:
        text: options and their values.
        flag: that gave it, for messages.

    Raises:
        ConfigError: for names that are no option of a run or may not vary, and values that do not fit.
    """
    if text is None:
        return [{}]
    found: dict[str, list[Any]] = {}
    for part in text.split(","):
        name, equals, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in _TUNED or not equals:
            hint = did_you_mean(name, _TUNED)
            listed = ", ".join(_TUNED)
            raise ConfigError(
                f"{flag} {part.strip()!r} is no option and its values, as in lr=1e-3:3e-3{hint}; it takes {listed}"
            )
        if name in found:
            raise ConfigError(f"{flag} names {name} twice")
        found[name] = list(dict.fromkeys(_value(name, value.strip(), flag) for value in values.split(":")))
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]


def _value(name: str, text: str, flag: str) -> Any:
    """Turn the text of a value into the type of its option."""
    kinds = typing.get_args(typing.get_type_hints(RunOptions)[name]) or (typing.get_type_hints(RunOptions)[name],)
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{flag} {name}: {text!r} is not true or false")
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    raise ConfigError(f"{flag} {name}: {text!r} is not a number")


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Name the keys in which two records differ."""
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def plain(options: ExperimentOptions) -> dict[str, Any]:
    """Return what makes an experiment the same one: all options but where it lies and how it is run."""
    values = dataclasses.asdict(options)
    free = ("output", "overwrite", "resume", "device", "track", "save_steps", "cache")
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if name not in free}
