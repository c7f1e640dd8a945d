"""Tasks about what stands in the prompt: several rows as numbered items, and a question about one of them.

The item that is named holds the answer, and nothing else does: a decoder that lost it cannot answer from what it knows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyra.errors import DataError
from pyra.records import record_problems
from pyra.tasks.language.prompts import fill, prompt_problems

ITEMS, NUMBER = "items", "number"
"""Columns that composed rows have besides their own: the items, and the number of the one that is asked for."""

_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Composition:
    """What a card says under ``compose``.

    Attributes:
        items: rows in a prompt, the one that is asked for among them.
        item: text of each, with ``{number}`` and ``{column}``.
    """

    items: int
    item: str


def composition_problems(values: Mapping[str, Any], columns: Sequence[str], prompt: str) -> list[str]:
    """List what is wrong with a composition: its keys, its text of an item, and what the prompt does not say."""
    problems = record_problems(Composition, values)
    if problems:
        return [f"compose: {problem}" for problem in problems]
    how = Composition(**values)
    if how.items < 2:
        problems.append(f"compose: items is {how.items}; it should be 2 at least")
    problems += prompt_problems(how.item, [*columns, NUMBER], "", where="compose: item")
    if f"{{{NUMBER}}}" not in how.item:
        problems.append(f"compose: item has no {{{NUMBER}}}")
    problems += [f"prompt: no {{{name}}} of compose in it" for name in (ITEMS, NUMBER) if f"{{{name}}}" not in prompt]
    problems += [f"columns: {name} is what compose makes" for name in (ITEMS, NUMBER) if name in columns]
    return problems


def compose(how: Composition, rows: Sequence[Mapping[str, str]], split: str) -> list[dict[str, str]]:
    """Make as many composed rows as there are rows, each asked for once.

    The other items of a prompt and the place of the right one depend on the split and the position of a row alone.

    Args:
        how: of the card.
        rows: of one split, the text of each column; no other split's stand in its prompts.
        split: its name.

    Raises:
        DataError: where the split has fewer rows than a prompt has items.
    """
    if len(rows) < how.items:
        raise DataError(f"each prompt holds {how.items} rows, the {split} split has {len(rows)}")
    return [_composed(how, rows, split, index) for index in range(len(rows))]


def _composed(how: Composition, rows: Sequence[Mapping[str, str]], split: str, index: int) -> dict[str, str]:
    draw = random.Random(f"{split} {index}")
    places = [other + (other >= index) for other in draw.sample(range(len(rows) - 1), how.items - 1)]
    number = draw.randint(1, how.items)
    places.insert(number - 1, index)
    texts = (fill(how.item, {**rows[place], NUMBER: str(n)}) for n, place in enumerate(places, 1))
    return {**rows[index], ITEMS: _BETWEEN.join(texts), NUMBER: str(number)}
