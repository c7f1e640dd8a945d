"""What every post-training run is told, whichever verb makes it: defaults, checked together."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from typing import ClassVar

from pyra.errors import ConfigError
from pyra.records import ABOVE_0, bound_problems, option
from pyra.tasks.language.adaptation import METHODS as METHODS
from pyra.tasks.language.adaptation import AdaptationOptions
from pyra.tasks.language.thinking import THINKING

CONTINUED = ("backbone", "method", "rate", "keep", "preset", "rule", "peft", "rank", "targets", "qat")
"""What a run that goes on from ``--adapter`` has from there."""


@dataclass(kw_only=True)
class _ChatOptions:
    """The data, and how chats become text."""

    data: str = option("", "file of JSON lines, folder with train.jsonl (and test.jsonl), or owner/name on the hub")
    held_out: float = option(0.05, "share of the rows that is held out to be scored, where --data has no test rows")
    max_length: int | None = option(
        None,
        "tokens that are read; longer examples are left out; 1024 by default, or what the backbone reads",
    )
    thinking: str = option("auto", "tell the chat template to think or not; auto: as it does itself", choices=THINKING)
    chat_template: str | None = option(None, "file with a Jinja chat template, instead of the tokenizer's")
    chat_template_kwargs: str | None = option(None, "what else the chat template is given, a JSON object")
    adapter: str | None = option(None, "go on from the adapter of this run folder, and with its --backbone and method")


@dataclass(kw_only=True)
class PostTrainingOptions(AdaptationOptions, _ChatOptions):
    """One post-training run.

    ``kind`` is the verb, and what ``options.json`` says of a run.
    """

    kind: ClassVar[str] = ""
    reads: ClassVar[str] = "a .jsonl file, a folder with train.jsonl or owner/name on the hub"

    dropout: float = option(0.0, "dropout in the adapter")
    steps: int | None = option(None, "optimiser steps, instead of --epochs")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower steps")

    def _has_start(self) -> bool:
        return self.adapter is not None

    def _has_data(self) -> bool:
        return bool(self.data.strip())

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not self._has_data():
            problems.append(f"--data is missing: give {self.reads}")
        problems += bound_problems(self, ABOVE_0, ("steps", "max_length"))
        if not 0 < self.held_out < 1:
            problems.append(f"--held-out must be in (0, 1), got {self.held_out}")
        if self.adapter is not None and self.dropout:
            problems.append("--dropout: what --adapter goes on from has its own; leave it out")
        for name in ("adapter", "chat_template"):
            if getattr(self, name) == "":
                problems.append(f"--{name.replace('_', '-')} is empty")
        return problems


def need_trl(verb: str) -> None:
    """Raise :class:`ConfigError` where trl is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(f"pyra {verb} needs trl: pip install 'pyra-adapt[posttraining]'")


def contradictions(options: PostTrainingOptions, earlier: AdaptationOptions) -> list[str]:
    """List the options that are neither those of the run that is gone on from, nor the default."""
    usual = {field.name: field.default for field in fields(options)}
    pairs = {name: (getattr(options, name), getattr(earlier, name)) for name in CONTINUED if name != "backbone"}
    return [
        f"--{name} {own}: {options.adapter} was trained with {theirs}; leave it out"
        for name, (own, theirs) in pairs.items()
        if own not in (usual[name], theirs)
    ]
