"""What ``pyra sft`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyra.records import option
from pyra.tasks.posttraining.options import PostTrainingOptions


@dataclass(kw_only=True)
class SftOptions(PostTrainingOptions):
    """One supervised run on chats."""

    kind: ClassVar[str] = "sft"

    turns: str = option("all", "turns of the assistant that are learnt: all, or the last", choices=("all", "last"))
    packing: bool = option(False, "several short examples in one row of --max-length tokens, apart from each other")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.packing and self.merges:
            problems.append(
                f"--packing: --method {self.method} merges the tokens of one prompt a row; leave --packing out"
            )
        return problems
