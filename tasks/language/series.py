"""The same run of a language task over several seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from pyra.errors import ConfigError
from pyra.records import option
from pyra.tasks.language.options import LanguageOptions


@dataclass(kw_only=True)
class SeriesOptions(LanguageOptions):
    """What ``pyra train`` takes for a language task."""

    seeds: int = option(1, "runs, with --seed, --seed + 1, ..., each in a folder of --output")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        super().__post_init__()
        if not 1 <= self.seeds <= 1000 or self.seed + self.seeds > 2**32:
            raise ConfigError(f"--seeds must be 1 to 1000, got {self.seeds}")

    def runs(self) -> list[LanguageOptions]:
        """Return the runs; one alone is written to the output folder itself."""
        given = {field.name: getattr(self, field.name) for field in fields(LanguageOptions)}
        if self.seeds == 1:
            return [LanguageOptions(**given)]
        seeds = range(self.seed, self.seed + self.seeds)
        return [LanguageOptions(**given | {"seed": s, "output": str(Path(self.output) / f"seed-{s}")}) for s in seeds]
