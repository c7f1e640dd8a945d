"""What a run on a language task is: every option with its default, checked together."""

from __future__ import annotations

from dataclasses import dataclass

from pyra.records import ABOVE_0, bound_problems, option
from pyra.tasks.language.adaptation import METHODS as _METHODS
from pyra.tasks.language.adaptation import AdaptationOptions
from pyra.tasks.language.cards import ANSWERS

_LINEAR = {"linear": "train a new head on the frozen backbone (--answer head)"}
METHODS = {name: _METHODS[name] for name in ("pyra", "tome")} | _LINEAR | _METHODS


@dataclass(kw_only=True)
class _TaskOptions:
    """The task, and how it is asked."""

    task: str = option("sst2", "a shipped task by name, or a card file of your own")
    root: str | None = option(
        None, "folder with a folder of each task's files (PYRA_DATA by default; the hub without either)"
    )
    data: str | None = option(
        None, "folder with the task's files themselves, instead of --root; without --task it tells the task"
    )
    answer: str | None = option(
        None,
        "how the task is answered: head, scoring (label words after the prompt) or generation; a head by default where "
        "the task has labels",
        choices=tuple(ANSWERS),
        metavar="HOW",
    )
    max_length: int | None = option(
        None, "tokens that are read, prompt and answer together; 512 by default, or what the backbone reads"
    )
    max_new_tokens: int = option(256, "tokens that are generated at most, for each answer")
    chat: bool = option(False, "give prompts through the tokenizer's chat template")


@dataclass(kw_only=True)
class LanguageOptions(AdaptationOptions, _TaskOptions):
    """One training run on a language task."""

    method: str = option("lora", "how to adapt: see above", choices=tuple(METHODS), metavar="NAME")
    lr: float | None = option(None, "peak learning rate of AdamW; by default 1e-3 (linear), 2e-5 (full), 3e-4 (others)")

    def _usual_learning_rate(self) -> float:
        return 1e-3 if self.method == "linear" else super()._usual_learning_rate()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.root is not None and self.data is not None:
            problems.append("give --root or --data, not both")
        problems += bound_problems(self, ABOVE_0, ("max_length", "max_new_tokens"))
        if self.method == "linear" and self.answer not in (None, "head"):
            problems.append(f"--method linear trains a head: --answer {self.answer} has none")
        return problems
