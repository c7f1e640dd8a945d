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
from pyra.scripts.task_data import cache, messages, prepare

if TYPE_CHECKING:
    from pyra.tasks.data.cards import TaskCard


@dataclass(kw_only=True)
class ListOptions:
    """Options of ``pyra tasks ls``."""

    suite: str | None = option(None, "tasks of this suite only")


@dataclass(kw_only=True)
class ValidateOptions:
    """Options of ``pyra tasks validate``."""

    name: str | None = option(None, "a task, a suite, or the card file of a language task; demo by default")
    root: str | None = option(None, "folder with the data of tasks that bring none (PYRA_DATA by default)")
    data: str | None = option(
        None,
        "instead of a task: your folder of images or parquet file, or owner/name on the hub; beside a language task: "
        "folder with its files",
    )
    image_column: str | None = option(None, "column of --data with the images, where type and name do not tell")
    label_column: str | None = option(None, "column of --data with the labels, the same")
    decode: bool = option(True, "decode every image, too")


VERBS = {
    "ls": "list the tasks that --task takes (also without a word)",
    "validate": "check that the data of a task or a suite is there and is what its card says",
    "prepare": "write a task or a suite as a local folder, from whatever source is reachable",
    "cache": "show or remove the decoded images that are kept on disk",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of :data:`VERBS`; ``ls`` without a word."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    verb = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "ls"
    if verb not in VERBS:
        raise ConfigError(f"pyra tasks has no verb {verb!r}{did_you_mean(verb, VERBS)}; it has {', '.join(VERBS)}")
    return {"ls": _list, "validate": _validate, "prepare": prepare, "cache": cache}[verb](arguments)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return (
        f"usage: pyra tasks VERB [options]\n\nverbs:\n{verbs}\n\n"
        "'pyra tasks VERB --help' shows the options of a verb.\n\n"
        "example:\n  pyra tasks validate vtab-1k --root data/"
    )


def _list(arguments: Sequence[str]) -> int:
    options = parse(
        ListOptions,
        arguments,
        prog="pyra tasks ls",
        description="List the tasks that --task takes. 'pyra tasks validate NAME' checks the data of one or a suite.",
        example="pyra tasks ls --suite vtab-1k",
    )
    from tabulate import tabulate

    from pyra.tasks.data.cards import KINDS, card_files, read_card, suite_folders

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
        description=(
            "Check that the data of a task, or of every task of a suite, is there and is what its card says; or that\n"
            "data of your own can be trained on. The exit status is 2 where it is not."
        ),
        example="pyra tasks validate vtab-1k --root data/\n  pyra tasks validate --data photos/",
        positional="name",
    )
    from pyra.tasks.language.cards import is_text_task

    about_texts = is_text_task(options.name)
    if options.data is not None and options.name is not None and not about_texts:
        raise ConfigError(f"give NAME ({options.name}) or --data ({options.data}), not both")
    if options.data is not None and options.root is not None and about_texts:
        raise ConfigError("give --root or --data, not both")
    if options.data is None and (options.image_column or options.label_column):
        raise ConfigError("--image-column and --label-column go with --data")
    from tabulate import tabulate
    from tqdm import tqdm

    from pyra.tasks.data.cards import suite_cards, suite_folders
    from pyra.tasks.data.columns import Columns
    from pyra.tasks.data.validation import validate, validate_data
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    root = options.root or os.environ.get("PYRA_DATA")
    counted = "images"
    if options.data is not None and not about_texts:
        found = [validate_data(options.data, Columns(options.image_column, options.label_column), options.decode)]
    else:
        name = options.name or "demo"
        suite = name in suite_folders()
        cards = suite_cards(name) if suite else [_card(name)]
        counted = "examples" if all(card.kind == "text" for card in cards) else "images"
        bar = tqdm([card.name for card in cards] if suite else [name], unit="task", disable=None, leave=False)
        found = [validate(one, root, options.decode, options.data) for one in bar]
    rows = [
        {
            "task": checked.task,
            "data": "missing" if checked.missing else "ERROR" if checked.problems else "ok",
            counted: " ".join(f"{name}:{count}" for name, count in checked.images.items()),
            "notes": "; ".join(checked.notes),
        }
        for checked in found
    ]
    print(tabulate(rows, headers="keys", maxcolwidths=[None, None, None, 90]))
    wrong = [checked for checked in found if checked.problems]
    failed = [(checked.task, str(checked.error), checked.missing) for checked in wrong]
    for text in messages(failed, root, "'pyra tasks prepare' writes them, 'pyra tasks validate TASK' says more"):
        print(f"\n{text}")
    print(f"\n{len(found) - len(wrong)} of {len(found)} tasks can be used" + (" as they are" if not wrong else ""))
    return 2 if wrong else 0


def _card(name: str) -> TaskCard:
    from pyra.tasks.data.cards import load_card
    from pyra.tasks.language.cards import find_text_card, is_text_task

    return find_text_card(name)[0] if is_text_task(name) else load_card(name)[0]
