"""Errors a user can act on: the message names the value, what is allowed and the next step.

The command line prints a :class:`PyraError` as one line and exits with status 2; everything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PyraError(Exception):
    """Base class of every error that is the input's fault."""


class ConfigError(PyraError, ValueError):
    """A configuration that cannot be used; the message lists all problems at once."""


class ScheduleError(PyraError, ValueError):
    """A schedule that does not fit the model or input; the message lists all problems at once."""


class UnsupportedModelError(PyraError, TypeError):
    """A backbone whose tokens cannot be merged, with the reason."""


class CheckpointError(PyraError, ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the tensors."""


class DataError(PyraError, ValueError):
    """A task or data set that cannot be found or read; the message names the file."""


class TrainingError(PyraError, ArithmeticError):
    """A training that diverged: a loss, a weight or a logit that is no number."""


class OutputError(PyraError, FileExistsError):
    """An output folder that would be overwritten."""


class OtherProcessError(PyraError):
    """The main process of a distributed run failed; it says why."""


class KernelError(PyraError, RuntimeError):
    """An implementation of the kernels that was asked for and cannot run here, with the reason."""


class ExportError(PyraError, ValueError):
    """An export that differs from its model, or a folder that holds none."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's (a class of torch), or that of torch's allocator on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``choices``, or the empty string.

    >>> did_you_mean("demmo", ["demo", "vtab"])
    " (did you mean 'demo'?)"
    """
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(repr(c) for c in close)}?)" if close else ""
