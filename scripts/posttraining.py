"""What ``pyra sft`` and ``pyra dpo`` have in common: train, part from the other processes, tell what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pyra.tasks.posttraining.options import PostTrainingOptions
    from pyra.tasks.results import RunResult

Options = TypeVar("Options", bound="PostTrainingOptions")


def train_and_tell(options: Options, train: Callable[[Options], tuple[RunResult, list[str]]]) -> int:
    """Train, and print the result as a table and what is worth knowing; the first of several processes prints.

    Raises:
        PyraError: as ``train`` does.
    """
    from pyra.tasks.fitting import processes
    from pyra.tasks.reports import results_table

    try:
        result, notes = train(options)
    finally:
        processes.leave()
    if not processes.is_main():
        return 0
    print(results_table([result]))
    for note in notes:
        print(note)
    print(
        f"trained in {result.train_seconds or 0:.0f} s, on a set of {result.train_tokens or 0:,} tokens of answers"
        f"; saved to {options.output}"
    )
    return 0
