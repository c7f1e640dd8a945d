"""``pyra tasks``: which tasks there are, and whether their data is what their cards say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError, did_you_mean
from pyra.records import option
from pyra.scripts.cli import parse

if TYPE_CHECKING:
    from pyra.tasks.cards import TaskCard


@dataclass(kw_only=True)
class ListOptions:
    """Options of ``pyra tasks ls``."""

    suite: str | None = option(None, "tasks of this suite only")


@dataclass(kw_only=True)
class ValidateOptions:
    """Options of ``pyra tasks validate``."""

    name: str = option("demo", "a task, a suite, or the card file of a language task")
    root: str | None = option(None, "folder with the data of tasks that bring none (PYRA_DATA by default)")
    decode: bool = option(True, "decode every image, too")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ls`` (also without a word) or ``validate``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "ls"
    verbs = {"ls": _list, "validate": _validate}
    if verb not in verbs:
        raise ConfigError(f"pyra tasks has 'ls' and 'validate', not {verb!r}{did_you_mean(verb, verbs)}")
    return verbs[verb](arguments)


def _list(arguments: Sequence[str]) -> int:
    options = parse(
        ListOptions,
        arguments,
        prog="pyra tasks ls",
        description="List the tasks that --task takes. 'pyra tasks validate NAME' checks the data of one or a suite.",
        example="pyra tasks ls --suite vtab-1k",
    )
    from tabulate import tabulate

    from pyra.tasks.cards import KINDS, card_files, read_card, suite_folders

    if options.suite is not None and options.suite not in suite_folders():
        known = suite_folders()
        hint = did_you_mean(options.suite, known)
        raise ConfigError(f"unknown suite {options.suite!r}{hint}; the suites are {', '.join(known)}")
    cards = [read_card(file) for file in card_files().values()]
    shown = sorted(cards, key=lambda card: (card.suite, card.group, card.name))
    shown = [card for card in shown if options.suite in (None, card.suite)]
    rows: list[dict[str, Any]] = [
        {
            "task": card.name,
            "suite": card.suite,
            "group": card.group,
            "classes": card.classes,
            "images": " + ".join(str(count) for name, count in card.splits.items() if name != "train800val200"),
            "metric": card.metric,
            "data": "with the package" if card.kind == "parquet" else KINDS[card.kind].partition(",")[0],
        }
        for card in shown
        if card.kind != "text"
    ]
    if rows:
        print(tabulate(rows, headers="keys"))
        print("\nimages: training (800) + validation (200) + test; --data FOLDER makes a task of your own images")
    rows = [
        {
            "task": card.name,
            "suite": card.suite,
            "group": card.group,
            "labels": card.classes or "-",
            "examples": " + ".join(map(str, card.splits.values())),
            "metric": card.metric,
            "data": KINDS[card.kind],
        }
        for card in shown
        if card.kind == "text"
    ]
    if rows:
        print(("" if options.suite else "\n") + tabulate(rows, headers="keys"))
        print("\nexamples: training (+ validation) + test; --task FILE.yaml makes a task of your own texts")
    return 0


def _validate(arguments: Sequence[str]) -> int:
    options = parse(
        ValidateOptions,
        arguments,
        prog="pyra tasks validate",
        description="Check that the data of a task, or of every task of a suite, is there and is what its card says.",
        example="pyra tasks validate vtab-1k --root data/",
        positional="name",
    )
    from tabulate import tabulate
    from tqdm import tqdm

    from pyra.tasks.cards import suite_cards, suite_folders
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.validation import validate

    quiet_libraries()
    suite = options.name in suite_folders()
    cards = suite_cards(options.name) if suite else [_card(options.name)]
    images = not all(card.kind == "text" for card in cards)
    root = options.root or os.environ.get("PYRA_DATA")
    names = [card.name for card in cards] if suite else [options.name]
    found = [validate(name, root, options.decode) for name in tqdm(names, unit="task", disable=None, leave=False)]
    rows = [
        {
            "task": checked.task,
            "data": "ok" if checked.error is None else "ERROR",
            "images" if images else "examples": " ".join(f"{name}:{count}" for name, count in checked.images.items()),
            "notes": checked.error or "; ".join(checked.notes),
        }
        for checked in found
    ]
    print(tabulate(rows, headers="keys", maxcolwidths=[None, None, None, 90]))
    wrong = [checked for checked in found if checked.error is not None]
    print(f"\n{len(found) - len(wrong)} of {len(found)} tasks can be used" + (" as they are" if not wrong else ""))
    return 2 if wrong else 0


def _card(name: str) -> TaskCard:
    from pyra.tasks.cards import load_card
    from pyra.tasks.language.cards import find_text_card, is_text_task

    return find_text_card(name)[0] if is_text_task(name) else load_card(name)[0]
