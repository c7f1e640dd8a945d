"""Cards of language tasks: which columns there are, what is asked, and how an answer is read.

A card is data: a prompt holds ``{column}`` and nothing else, and an answer is read by a rule that has a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pyra.errors import DataError, did_you_mean
from pyra.records import record_problems
from pyra.tasks.data.cards import TaskCard, card_files, load_card
from pyra.tasks.language.answers import RULES
from pyra.tasks.language.composing import ITEMS, NUMBER, Composition, composition_problems
from pyra.tasks.language.prompts import prompt_problems

ANSWERS = {
    "head": "a new classification head (trained)",
    "scoring": "the label whose words are likeliest after the prompt",
    "generation": "the words that are generated after the prompt",
}
METRICS = {"accuracy": True, "exact_match": True}
"""Metrics of language tasks, and whether higher is better."""

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class TextCard(TaskCard):
    """Modifications against :class:`~pyra.tasks.data.cards.TaskCard`: texts instead of images.

    Attributes:
        kind: ``text``.
        classes: number of labels; 0 where the answer is free text.
        preprocessing: none.
        folder: below the root, that ``files`` are in; may be empty.
        files: of the splits ``train``, ``test`` and, where there is one, ``validation``. A ``.tsv`` or ``.csv`` file
            has ``columns`` as its first line, or no first line of names and exactly these columns.
        hub: ``owner/name`` of the same data on the hub.
        hub_splits: the hub's name of each split, where it is another.
        columns: that every row has.
        compose: makes prompts of several rows each (:class:`pyra.tasks.language.composing.Composition`).
        text: column that a head classifies; the prompt's columns where it is empty.
        pair: second column, for tasks about two texts.
        target: column of the label (a number from 0, or a name) or of the answer.
        labels: names of the labels, in order.
        label_words: what a decoder says for each label; ``labels`` where it is empty.
        prompt: what a decoder reads, with ``{column}`` for the value of a column. The answer follows after a space.
        answer: how a decoder answers: ``scoring`` or ``generation``.
        extract: rule that reads an answer (:data:`pyra.tasks.language.answers.RULES`).
        stop: texts that end a generated answer.
        max_length: tokens that are read where ``--max-length`` does not say it; 0 leaves that to the backbone.
    """

    classes: int = 0
    preprocessing: str = "none"
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    compose: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    pair: str = ""
    target: str = ""
    labels: list[str] = field(default_factory=list)
    label_words: list[str] = field(default_factory=list)
    prompt: str = ""
    answer: str = "generation"
    extract: str = "whole"
    stop: list[str] = field(default_factory=list)
    max_length: int = 0

    @property
    def brings_its_data(self) -> bool:
        """Whether nothing has to be fetched."""
        return False

    @property
    def words(self) -> list[str]:
        """What a decoder says for each label."""
        return self.label_words or self.labels

    @property
    def composition(self) -> Composition | None:
        """How prompts are made of several rows, where they are."""
        return Composition(**self.compose) if self.compose else None

    @property
    def layout(self) -> str:
        """Say which files are looked for below the root."""
        where = f"{self.folder}/" if self.folder else ""
        return ", ".join(f"{where}{file}" for file in self.files.values())


def text_card(values: Mapping[str, Any], path: Path) -> TextCard:
    """Make a card of the values in a file.

    Raises:
        DataError: with all problems; the message names the file.
    """
    problems = record_problems(TextCard, values)
    if not problems:
        card = TextCard(**values)
        problems = _list_problems(card) or _problems(card)
        if not problems:
            return card
    raise DataError(f"{path}: {'; '.join(problems)}")


def find_text_card(task: str) -> tuple[TextCard, Path]:
    """Return the card of a language task, and the folder it lies in.

    Args:
        task: name of a shipped one, or a YAML file of your own.

    Raises:
        DataError: for an unknown name, a task of images, or a file that is no card.
    """
    path = Path(task).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return text_card(_read_yaml(path), path), path.resolve().parent
    card, home = load_card(task)
    if not isinstance(card, TextCard):
        raise DataError(f"task {task!r} is about images; the language tasks are {', '.join(text_task_names())}")
    return card, home


def text_task_names() -> list[str]:
    """Return the names of the language tasks that ship with the package."""
    return sorted(name for name, file in card_files().items() if file.parent == Path(__file__).parent)


def is_text_task(task: str | None) -> bool:
    """Whether a name of ``--task`` is a language task, or a card file, and not a task of images."""
    return task is not None and (task in text_task_names() or Path(task).suffix in (".yaml", ".yml"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the card {path}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict) or values.get("kind") != "text":
        raise DataError(f"{path} is no card of a language task: it must hold 'kind: text' and what the README lists")
    return values


def _list_problems(card: TextCard) -> list[str]:
    lists = {"files": card.files.values(), "hub_splits": card.hub_splits.values(), "splits": card.splits}
    return [f"{name} should map names to text" for name, texts in lists.items() if not all(map(_is_text, texts))]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _problems(card: TextCard) -> list[str]:
    problems = []
    if not card.files and not card.hub:
        problems.append("give files, hub, or both")
    for split, file in card.files.items():
        if split not in SPLITS:
            problems.append(f"split {split!r} is not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
        if Path(file).suffix not in SUFFIXES:
            problems.append(f"file {file!r} should end with one of {', '.join(SUFFIXES)}")
    if card.files and not {"train", "test"} <= card.files.keys():
        problems.append("files needs train and test")
    for file in (*card.files.values(), card.folder):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            problems.append(f"{file!r} leads out of the root")
    if len(set(card.columns)) < len(card.columns):
        problems.append("columns names one twice")
    for name in ("target", "text", "pair"):
        column = getattr(card, name)
        if (column or name == "target") and column not in card.columns:
            problems.append(f"{name} {column!r} is not one of the columns{did_you_mean(column, card.columns)}")
    if card.pair and not card.text:
        problems.append("pair needs text")
    if card.hub and (":" in card.hub or card.hub.count("/") != 1):
        problems.append(f"hub {card.hub!r} is no owner/name; a configuration is named by hub_config")
    if card.compose:
        problems += composition_problems(card.compose, card.columns, card.prompt)
    made = [ITEMS, NUMBER] if card.compose else []
    problems += prompt_problems(card.prompt, [*card.columns, *made], card.target)
    problems += _answer_problems(card)
    return problems


def _answer_problems(card: TextCard) -> list[str]:
    problems = []
    choices = [name for name in ANSWERS if name != "head"]
    if card.answer not in choices:
        problems.append(f"answer {card.answer!r} is not one of {', '.join(choices)}")
    if card.extract not in RULES:
        problems.append(f"extract {card.extract!r} is not one of {', '.join(RULES)}{did_you_mean(card.extract, RULES)}")
    if card.metric not in METRICS:
        problems.append(f"metric {card.metric!r} is not one of {', '.join(METRICS)}")
    elif card.higher_is_better != METRICS[card.metric]:
        problems.append(f"higher is better for {card.metric}")
    if card.labels and (len(card.labels) < 2 or len(set(card.labels)) < len(card.labels)):
        problems.append("labels should be two names at least, each another")
    if card.classes != len(card.labels):
        problems.append(f"classes is {card.classes}, labels has {len(card.labels)}")
    if card.label_words and (
        len(card.label_words) != len(card.labels) or len(set(card.label_words)) < len(card.label_words)
    ):
        problems.append("label_words should be one for each label, each another")
    if any(not word.strip() for word in (*card.labels, *card.label_words)):
        problems.append("labels and label_words may not be empty")
    if any(not text for text in card.stop):
        problems.append("stop may not hold an empty text")
    if (card.metric == "accuracy") != bool(card.labels):
        problems.append("accuracy is for tasks with labels, exact_match for those without")
    if card.compose and card.labels:
        problems.append("compose is for tasks without labels")
    if card.max_length < 0:
        problems.append(f"max_length is {card.max_length}; it should be at least 0")
    if card.answer == "scoring" and not card.labels:
        problems.append("answer scoring needs labels")
    return problems
