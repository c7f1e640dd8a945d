"""What ``pyra rl`` is told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from pyra.errors import ConfigError
from pyra.records import ABOVE_0, AT_LEAST_0, bound_problems, option
from pyra.tasks.posttraining.arithmetic import Arithmetic
from pyra.tasks.posttraining.fiberpo import C_MINUS, C_PLUS, EPS, UPDATES, budget_problems, group_problems
from pyra.tasks.posttraining.options import PostTrainingOptions

ALGORITHMS = {
    "fiberpo": "budgets of whole answers, which roll back, and what tokens move beside them",
    "grpo": "the ratio of every token, clipped",
    "gspo": "the ratio of whole answers, clipped",
}
CLIPS = {"grpo": 0.2, "gspo": 4e-4}
"""Clip of the ratio by algorithm, where none is given: usual ones, as published for both."""
REWARDS = {
    "answer": "1 for the right answer",
    "form": "1 for an answer that is of the form --form and nothing else",
    "length": "from 0 down to -1 for answers longer than half of --max-new-tokens",
}
TASKS = ("arithmetic",)
_FLAGS = ("--c-plus", "--c-minus", "--fiber-eps")
_GROUP_FLAGS = ("--group-c-plus", "--group-c-minus", "--group-eps")


@dataclass(kw_only=True)
class RlOptions(PostTrainingOptions):
    """One run on rewards that can be verified."""

    kind: ClassVar[str] = "rl"
    reads: ClassVar[str] = f"{PostTrainingOptions.reads}, or --task {TASKS[0]}"

    task: str | None = option(None, "problems that are made up, instead of --data", choices=TASKS, metavar="NAME")
    algorithm: str = option("fiberpo", "what an update maximises: see above", choices=tuple(ALGORITHMS))
    steps: int | None = option(100, "optimiser steps: --updates of them on each rollout")
    batch_size: int = option(
        32, "answers of a rollout, and of a step, in all processes; prompts that are scored at once by each"
    )
    group: int = option(8, "answers to each prompt, which are compared with each other")
    updates: int = option(UPDATES, "optimiser steps on each rollout")
    c_plus: float = option(C_PLUS, "fiberpo: how far an answer may drift upwards, in nats a token")
    c_minus: float = option(C_MINUS, "fiberpo: how far downwards; below --c-plus")
    fiber_eps: float = option(EPS, "fiberpo: how far a token may move beside its answer")
    group_c_plus: float | None = option(
        None, "fiberpo: how far the answers to a prompt may drift upwards together, below --c-plus; by default no limit"
    )
    group_c_minus: float | None = option(None, "fiberpo: how far downwards; below --c-minus; with --group-c-plus")
    group_eps: float | None = option(None, "fiberpo: how far one may drift beside the others; with --group-c-plus")
    clip: float | None = option(None, "grpo and gspo: clip of the ratio; 0.2 and 4e-4 by default")
    beta: float = option(0.0, "weight of the divergence from the model before the training")
    temperature: float = option(1.0, "of the answers that are drawn")
    max_new_tokens: int = option(64, "tokens of an answer, at most")
    rewards: tuple[str, ...] = option(("answer",), "what is rewarded, added up: see above", choices=tuple(REWARDS))
    form: str = option(r"\s*-?\d+\s*", "regular expression of a whole answer, for the reward form")
    problems: int = option(2000, "with --task: training problems")
    test_problems: int = option(200, "with --task: problems that are held out")
    digits: int = option(2, "arithmetic: digits of each number, at most")
    terms: int = option(2, "arithmetic: numbers in a problem")
    operators: str = option("+-", "arithmetic: operators, of + - *")

    def arithmetic(self) -> Arithmetic:
        """Return how hard the problems of ``--task arithmetic`` are; the same ones whatever the seed of the run."""
        return Arithmetic(digits=self.digits, terms=self.terms, operators=self.operators)

    def _has_data(self) -> bool:
        return bool(self.data.strip()) or self.task is not None

    def _usual_learning_rate(self) -> float:
        return 1e-6 if self.method == "full" else 1e-5

    def _problems(self) -> list[str]:
        if isinstance(self.rewards, list):  # from JSON
            self.rewards = tuple(self.rewards)
        problems = super()._problems()
        if self.data.strip() and self.task is not None:
            problems.append("give --data or --task, not both")
        above = ("group", "updates", "temperature", "max_new_tokens", "problems", "test_problems", "clip")
        problems += bound_problems(self, ABOVE_0, above)
        problems += bound_problems(self, AT_LEAST_0, ("beta",))
        problems += budget_problems(self.c_plus, self.c_minus, self.fiber_eps, _FLAGS)
        problems += self._group_problems()
        problems += self._rollout_problems()
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            problems.append(f"--rewards must be some of {', '.join(REWARDS)}, each once")
        if self.algorithm == "fiberpo" and self.clip is not None:
            problems.append("--clip is of grpo and gspo: fiberpo has --c-plus, --c-minus and --fiber-eps")
        if self.beta and self.method == "full":
            problems.append("--beta needs an adapter, which is switched off to compare with: take --method lora")
        if self.method == "adalora" or self.peft == "adalora":
            problems.append("adalora moves its ranks by a schedule of its own, which rollouts do not fit: take lora")
        try:
            re.compile(self.form)
        except re.error as error:
            problems.append(f"--form {self.form!r} is no regular expression ({error})")
        try:
            self.arithmetic()
        except ConfigError as error:
            problems.append(f"--{str(error).removeprefix('arithmetic: ')}")
        return problems

    def _group_problems(self) -> list[str]:
        budgets = (self.group_c_plus, self.group_c_minus, self.group_eps)
        given = [flag for flag, value in zip(_GROUP_FLAGS, budgets, strict=True) if value is not None]
        if given and self.algorithm != "fiberpo":
            return [f"{' and '.join(given)}: of fiberpo alone, leave out with --algorithm {self.algorithm}"]
        return group_problems(budgets, (self.c_plus, self.c_minus), _GROUP_FLAGS)

    def _rollout_problems(self) -> list[str]:
        if self.group < 2:
            return ["--group must be 2 at least: answers to one prompt are compared with each other"]
        if self.batch_size % self.group:
            near = self.group * max(round(self.batch_size / self.group), 1)
            return [
                f"--batch-size {self.batch_size} must be a multiple of --group {self.group}, the answers to each "
                f"prompt: {near} would be one"
            ]
        return []
