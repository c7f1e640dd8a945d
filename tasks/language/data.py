"""Language tasks as examples: what is read, what is asked, and the answer.

>>> task = load_text_task("sst2", root="data/")  # doctest: +SKIP
>>> task.splits["test"][0].prompt  # doctest: +SKIP
'Review: ...'
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyra.errors import DataError, did_you_mean
from pyra.tasks.language.answers import RULES
from pyra.tasks.language.cards import TextCard, find_text_card
from pyra.tasks.language.composing import compose
from pyra.tasks.language.prompts import BETWEEN_EXAMPLES, SEPARATOR, fill
from pyra.tasks.language.sources import Record, read_records

LIMIT_SEED = 0


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        texts: what a head classifies: one text or two.
        prompt: what a decoder reads.
        answer: what it should go on with.
        label: index into the labels; -1 where there are none.
        reference: what an extracted answer is compared with.
        source: what errors call it.
    """

    texts: tuple[str, ...]
    prompt: str
    answer: str
    label: int
    reference: str
    source: str


@dataclass(frozen=True)
class TextTask:
    """A language task: its card and its splits, at least ``train`` and ``test``.

    ``source`` says where the data came from: a folder, or ``hub:`` and a name there.
    """

    card: TextCard
    splits: Mapping[str, Sequence[Example]] = field(repr=False, compare=False)
    source: str = ""

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.card.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels; none where the answer is free text."""
        return tuple(self.card.labels)

    def split(self, name: str, limit: int | None = None) -> list[Example]:
        """Return the examples of a split; ``limit`` keeps that many, drawn with a fixed seed and left in order.

        Raises:
            DataError: for an unknown split, or a limit below 1.
        """
        if name not in self.splits:
            hint = did_you_mean(name, self.splits)
            raise DataError(f"task {self.name} has no split {name!r}{hint}; its splits are {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise DataError(f"limit is {limit}; it must be at least 1 example")
        examples = list(self.splits[name])
        if limit is not None and limit < len(examples):
            kept = sorted(random.Random(LIMIT_SEED).sample(range(len(examples)), limit))
            examples = [examples[index] for index in kept]
        return examples

    def shown(self, count: int) -> str:
        """Return answered training examples to put before a prompt, drawn with a fixed seed; nothing for 0.

        Raises:
            DataError: where the training split has fewer.
        """
        train = self.splits["train"]
        if not 0 <= count <= len(train):
            raise DataError(f"{count} examples were asked for, the training split of {self.name} has {len(train)}")
        drawn = random.Random(LIMIT_SEED).sample(range(len(train)), count)
        texts = (train[index].prompt + SEPARATOR + train[index].answer for index in drawn)
        return "".join(text + BETWEEN_EXAMPLES for text in texts)


def load_text_task(task: str, root: str | None = None, data: str | None = None) -> TextTask:
    """Load a language task.

    Args:
        task: name of a shipped one, or a card file of your own.
        root: folder its files are below: by default what ``PYRA_DATA`` names; without that a card file's own folder,
            and for a shipped task the hub.
        data: folder with the task's files themselves, instead.

    Raises:
        DataError: for an unknown task, or data that is not there or is not what the card says.
    """
    card, home = find_text_card(task)
    if data is not None:
        card, root = dataclasses.replace(card, folder=""), data
        if not data.strip():
            raise DataError(f"--data is empty; give the folder with {card.layout} (. for this one)")
        if Path(data).expanduser().is_file():
            raise DataError(f"--data {data} is a file; give the folder with {card.layout}")
    root = root or os.environ.get("PYRA_DATA")
    place = Path(root).expanduser() if root else None
    if place is None and card.files and all((home / card.folder / file).is_file() for file in card.files.values()):
        place = home
    records = read_records(card, place, flag="--root" if data is None else "--data")
    splits = {name: _examples(card, name, rows) for name, rows in records.items()}
    return TextTask(card, splits, f"hub:{card.hub}" if place is None else str(place / card.folder))


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of examples: prompts, answers and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for text in (*example.texts, example.prompt, example.answer, str(example.label)):
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _examples(card: TextCard, split: str, rows: Sequence[Record]) -> list[Example]:
    """Turn rows into examples; all rows that are wrong are counted, the first few are named."""
    if card.composition is not None:
        composed = compose(card.composition, [row.values for row in rows], split)
        rows = [Record(values, row.source) for values, row in zip(composed, rows, strict=True)]
    made, problems = [], []
    for row in rows:
        made_of = _example(card, row)
        if isinstance(made_of, str):
            problems.append(f"{row.source}: {made_of}")
        else:
            made.append(made_of)
    if problems:
        more = f"; and {len(problems) - 3} more rows" if len(problems) > 3 else ""
        raise DataError(f"{'; '.join(problems[:3])}{more} (split {split} of {card.name})")
    return made


def _example(card: TextCard, row: Record) -> Example | str:
    """Return an example, or what is wrong with its row."""
    texts = tuple(row.values[name] for name in (card.text, card.pair) if name)
    prompt = fill(card.prompt, row.values)
    read = [name for name in card.columns if name != card.target and f"{{{name}}}" in card.prompt] + [
        name for name in (card.text, card.pair) if name
    ]
    empty = [name for name in read if not row.values[name].strip()]
    if empty:
        return f"{empty[0]} is empty"
    target = row.values[card.target].strip()
    if not card.labels:
        reference = RULES[card.extract](target)
        if reference is None:
            return f"no answer in {target[:40]!r} (rule {card.extract})"
        return Example(texts or (prompt,), prompt, target, -1, reference, row.source)
    label = _label(card.labels, target)
    if label is None:
        return f"label {target[:40]!r} is not one of {', '.join(card.labels)}, nor a number below {len(card.labels)}"
    word = card.words[label]
    return Example(texts or (prompt,), prompt, word, label, word, row.source)


def _label(labels: Sequence[str], text: str) -> int | None:
    if text in labels:
        return labels.index(text)
    number = text.removesuffix(".0")  # pandas writes whole numbers so where a row is missing
    return int(number) if number.isdecimal() and int(number) < len(labels) else None
