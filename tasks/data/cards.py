"""Task cards: one YAML file a task says what it is, where its data comes from and how it is scored.

A task that brings its data is a folder with a ``task.yaml`` in it; a suite is a folder with one file a task and a
``README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pyra.errors import DataError, did_you_mean
from pyra.records import record_problems

PREPROCESSING = ("squash",)
KINDS = {
    "parquet": "parquet files beside the card",
    "lists": "a folder below --root with images and lists of them, or parquet files of the same names",
    "sprites": "drawn when it is loaded",
    "text": "text files below --root, or the hub",
}


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """What the file of a task says; unknown keys are errors.

    Attributes:
        name: what ``--task`` takes.
        description: what is in the pictures, and what is asked.
        kind: how the data is had (:data:`KINDS`).
        splits: images of each split, by its name; a count that differs is told.
        files: kind ``parquet``: the file of each split.
        folder: kind ``lists``: below the root.
        factor: kind ``sprites``: what is asked, ``orientation`` or ``x``.
        hub: kind ``lists``: a data set of the Hugging Face hub with the same images, where one is known.
        hub_config: its configuration.
        image_column: of the hub's data set; found by type where it is empty.
        label_column: the same.
        classes: number of classes.
        preprocessing: how an image becomes the model's input.
        metric: name of the metric.
        higher_is_better: its direction.
        source: where the data comes from.
        paper: that describes it.
        license: of the data.
        version: rises where results before and after cannot be compared.
        suite: it belongs to.
        group: within the suite.
    """

    name: str
    description: str
    classes: int
    metric: str
    higher_is_better: bool
    preprocessing: str
    license: str
    version: str
    source: str
    kind: str = "parquet"
    splits: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    factor: str = ""
    hub: str = ""
    hub_config: str = ""
    image_column: str = ""
    label_column: str = ""
    paper: str = ""
    suite: str = ""
    group: str = ""

    @property
    def brings_its_data(self) -> bool:
        """Whether nothing has to be fetched."""
        return self.kind != "lists"


def card_files() -> dict[str, Path]:
    """Return the file of each shipped task, by name, in order."""
    found = {file.parent.name: file for file in _root().glob("*/task.yaml")}
    found |= {file.stem: file for suite in suite_folders().values() for file in suite.glob("*.yaml")}
    return dict(sorted(found.items()))


def suite_folders() -> dict[str, Path]:
    """Return the folder of each suite, by name: ``vtab-1k`` lies in ``vtab_1k``."""
    folders = (readme.parent for readme in _root().glob("*/README.md") if not (readme.parent / "task.yaml").exists())
    return {folder.name.replace("_", "-"): folder for folder in sorted(folders) if any(folder.glob("*.yaml"))}


def load_card(name: str) -> tuple[TaskCard, Path]:
    """Return the card of a shipped task, and the folder it lies in.

    Raises:
        DataError: for an unknown name (with suggestions), or a card with problems (all of them).
    """
    files = card_files()
    if name not in files:
        suites = suite_folders()
        if name in suites:
            raise DataError(
                f"{name!r} is a suite of {len(suite_cards(name))} tasks; give one of them (`pyra tasks ls`)"
            )
        raise DataError(
            f"unknown task {name!r}{did_you_mean(name, [*files, *suites])}; the tasks are {', '.join(files)}; "
            "--data FOLDER reads your own"
        )
    return read_card(files[name]), files[name].parent


def suite_cards(name: str) -> list[TaskCard]:
    """Return the cards of a suite, in order of group and name."""
    cards = [read_card(file) for file in suite_folders()[name].glob("*.yaml")]
    return sorted(cards, key=lambda card: (card.group, card.name))


def read_card(path: Path) -> TaskCard:
    """Read a card; raises :class:`DataError` with all its problems."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.get("kind") == "text":
        from pyra.tasks.language.cards import text_card  # which builds on this module

        return text_card(values, path)
    problems = record_problems(TaskCard, values)
    if not problems:
        card = TaskCard(**values)
        if card.preprocessing not in PREPROCESSING:
            problems.append(f"preprocessing {card.preprocessing!r} is not one of {', '.join(PREPROCESSING)}")
        if card.kind not in KINDS:
            problems.append(f"kind {card.kind!r} is not one of {', '.join(KINDS)}{did_you_mean(card.kind, KINDS)}")
        needed = {"parquet": "files", "lists": "folder", "sprites": "factor"}.get(card.kind)
        if needed and not getattr(card, needed):
            problems.append(f"kind {card.kind} needs {needed}")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return card


def _root() -> Path:
    return Path(__file__).parents[1]
