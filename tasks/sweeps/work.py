"""One run of a sweep, where it takes place: in a worker process that keeps what runs share."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyra.errors import PyraError, TrainingError, is_out_of_memory
from pyra.files import write_json
from pyra.tasks.options import RunOptions
from pyra.tasks.results import RESULT_FILE, RunResult, evaluation_file, read_result
from pyra.tasks.shelf import Shelf

HALVED = "batch halved: it ran out of memory"


@dataclass(frozen=True)
class Work:
    """A run as it is handed to a worker, in plain types.

    Attributes:
        name: of the run.
        options: values of its :class:`~pyra.tasks.options.RunOptions`; the output is its folder.
        rates: at which an elastic run is scored.
        halved: whether its batch was halved after it ran out of memory.
    """

    name: str
    options: dict[str, Any]
    rates: tuple[float, ...] = ()
    halved: bool = False

    def with_half_the_batch(self) -> Work | None:
        """Return the same with half the images a step, or None where there is nothing left to halve."""
        batch = self.options["batch_size"]
        accumulate = self.options["accumulate"]
        if self.halved or batch < 2 or (batch // 2) % accumulate:
            return None
        return dataclasses.replace(self, options={**self.options, "batch_size": batch // 2}, halved=True)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        result: of a run that finished.
        kind: ``finished``, ``error`` (of the input), ``diverged``, ``memory``, ``killed`` or ``fault`` (of this code).
        error: one line, for a run that did not.
        seconds: that it took in its worker; 0 for one whose process ended.
    """

    result: RunResult | None = None
    kind: str = "finished"
    error: str = ""
    seconds: float = 0.0


def perform(work: Work, shelf: Shelf | None = None) -> Outcome:
    """Do a run, or what is left of it, and say how it ended; nothing is raised but what ends a process."""
    started = time.perf_counter()
    outcome = _perform(work, shelf)
    return dataclasses.replace(outcome, seconds=time.perf_counter() - started)


def _perform(work: Work, shelf: Shelf | None) -> Outcome:
    from pyra.tasks.evaluation import evaluate_run
    from pyra.tasks.sweeps.folder import holds_result
    from pyra.tasks.training import Plan, train

    try:
        options = RunOptions(**work.options)
        result = train(options, Plan(shelf=shelf))
        if work.halved and result.note is None:
            result = dataclasses.replace(result, note=HALVED)
            write_json(Path(options.output) / RESULT_FILE, result)
        for rate in work.rates:
            if not holds_result(Path(options.output) / evaluation_file("test", rate)):
                evaluate_run(options.output, rate=rate, device=options.device)
        return Outcome(read_result(options.output))
    except TrainingError as error:
        return Outcome(kind="diverged", error=_line(error))
    except PyraError as error:
        return Outcome(kind="error", error=_line(error))
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(kind="memory", error=_line(error) or "out of memory")
        return Outcome(kind="fault", error=f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:499]}…"
