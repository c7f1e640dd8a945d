"""``pyra tasks prepare`` and ``pyra tasks cache``: data of tasks on this disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse


@dataclass(kw_only=True)
class PrepareOptions:
    """Options of ``pyra tasks prepare``."""

    name: str = option("", "a task or a suite")
    output: str = option("", "folder to write; each task has one of its own in it")
    source: str | None = option(
        None, "where the images of a task are: a folder or parquet file (lists or any other), or owner/name on the hub"
    )
    root: str | None = option(None, "folder with the data of tasks that bring none (PYRA_DATA by default)")
    image_column: str | None = option(None, "column of --source with the images, where type and name do not tell")
    label_column: str | None = option(None, "column of --source with the labels, the same")


@dataclass(kw_only=True)
class CacheOptions:
    """Options of ``pyra tasks cache``."""

    clear: bool = option(False, "remove all decoded images")


def prepare(arguments: Sequence[str]) -> int:
    """Write local folders of a task or of all tasks of a suite; print a table."""
    options = parse(
        PrepareOptions,
        arguments,
        prog="pyra tasks prepare",
        description=(
            "Write a task, or every task of a suite, as a local folder that --root takes: from the folder below\n"
            "--root, drawn, from the hub, or from --source. Where a source has no train800 and val200, they are drawn\n"
            "by class with a fixed seed, and the manifest says so. What is finished is not made again."
        ),
        example="pyra tasks prepare vtab-1k --output data/\n  pyra tasks prepare dtd --source photos/ --output data/",
        positional="name",
    )
    missing = [text for text, value in (("NAME", options.name), ("--output", options.output)) if not value.strip()]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing (see 'pyra tasks prepare --help')")
    from pathlib import Path

    from tabulate import tabulate
    from tqdm import tqdm

    from pyra.errors import DataError, OutputError
    from pyra.tasks.data.cards import load_card, suite_cards, suite_folders
    from pyra.tasks.data.columns import Columns
    from pyra.tasks.data.preparation import Prepared, prepare
    from pyra.tasks.data.sources import MissingData
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    suites = suite_folders()
    if options.name in suites and options.source is not None:
        raise ConfigError(f"--source goes with one task, {options.name} is a suite; --root takes a folder of many")
    names = [card.name for card in suite_cards(options.name)] if options.name in suites else [options.name]
    root = options.root or os.environ.get("PYRA_DATA")
    rows: list[dict[str, Any]] = []
    failed: list[tuple[str, str, bool]] = []
    for name in names:
        card, home = load_card(name)
        with tqdm(desc=name, unit="image", disable=None, leave=False) as bar:

            def advance(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                done = prepare(
                    card,
                    home,
                    Path(options.output),
                    source=options.source,
                    root=root,
                    columns=Columns(options.image_column, options.label_column),
                    advance=advance,
                )
            except (DataError, OutputError) as error:
                if len(names) == 1:
                    raise
                done = Prepared(name, error=str(error), missing=isinstance(error, MissingData))
                failed.append((name, str(error), done.missing))
        images = " ".join(f"{split}:{count}" for split, count in done.images.items())
        state = "there before" if len(done.there) == len(done.images) else "written"
        if done.error:
            state = "missing" if done.missing else "ERROR"
        rows.append({"task": name, "data": state, "images": images, "draw": done.draw, "from": done.source})
    print(tabulate(rows, headers="keys", maxcolwidths=[None, None, None, None, 80]))
    for text in messages(failed, root, "'pyra tasks prepare TASK' says more"):
        print(f"\n{text}")
    ready = len(rows) - len(failed)
    print(f"\n{ready} of {len(rows)} tasks are in {options.output}")
    if ready:
        print(f"next: pyra tasks validate {options.name} --root {options.output}")
    return 2 if failed else 0


def messages(failed: Sequence[tuple[str, str, bool]], root: str | None, more: str) -> list[str]:
    """Return a message for each task that failed, and a single one for all tasks of a suite that have no data.

    Args:
        failed: name of a task, what is wrong, and whether there is no data at all.
        root: where it was looked for.
        more: how to hear more of a task.
    """
    missing = [task for task, _, nothing in failed if nothing]
    told = [f"{task}: {error}" for task, error, nothing in failed if not nothing or len(missing) == 1]
    if len(missing) > 1:
        told.append(
            f"{len(missing)} tasks have no data {f'below {root}' if root else 'without --root FOLDER'}: "
            f"{', '.join(missing)}; each needs FOLDER/TASK/ with train800.txt, val200.txt, test.txt and the images "
            f"they list, or those as parquet files ({more})"
        )
    return told


def cache(arguments: Sequence[str]) -> int:
    """List or remove the decoded images that are kept on disk."""
    options = parse(
        CacheOptions,
        arguments,
        prog="pyra tasks cache",
        description=(
            "Show the decoded images that runs keep on disk. PYRA_CACHE says where (off: nowhere), PYRA_CACHE_LIMIT\n"
            "how many GiB (20); what was used least recently goes first."
        ),
        example="pyra tasks cache --clear",
    )
    from pyra.tasks.data.pixel_cache import GIB, default_cache

    found = default_cache()
    if found is None:
        print("the cache is off (PYRA_CACHE)")
        return 0
    if options.clear:
        print(f"{found.clear() / GIB:.2f} GiB removed from {found.folder}")
        return 0
    from tabulate import tabulate

    rows = found.listed()
    if rows:
        print(tabulate(rows, headers="keys", floatfmt=".1f"))
    taken = sum(size for _, size, _ in found.entries()) / GIB
    print(f"\n{taken:.2f} of {found.limit / GIB:g} GiB in {found.folder}; --clear removes it")
    return 0
