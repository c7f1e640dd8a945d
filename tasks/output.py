"""The folder that a run, a demonstration or an export writes: filled beside what is there, swapped in when complete.

Every such folder holds a claim file that says what it is; a folder without one is somebody's own and is never written.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pyra.errors import OutputError
from pyra.files import write_json
from pyra.tasks.results import RESULT_FILE

CLAIM_FILE = ".pyra-run"
"""Says which kind of output a folder holds."""

Kind = Literal["run", "demo", "export"]

WRITTEN: dict[Kind, tuple[str, ...]] = {
    "run": (
        RESULT_FILE,
        "options.json",
        "labels.json",
        "data.json",
        "backbone.json",
        "adapter",
        "evaluation*.json",
        "predictions.json",
        "lm-eval*.json",
        "export",
    ),
    "demo": ("demo.json", "demo.md", "pareto.png", "pareto.html", "merged_tokens.png", "adapted", "export"),
    "export": ("model.onnx", "export.json", "speed.json"),
}
"""What each kind writes, as patterns; nothing else is ever removed."""

_INSIDE: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "pyra_config.json", "README.md"),
    "export": (*WRITTEN["export"], CLAIM_FILE),
}
"""What pyra writes into folders of an output; with anything else in them they are not replaced."""

_WORTH_KEEPING: dict[Kind, str] = {"run": "adapter"}  # what an interrupted output is kept for
_PARTIAL = ".partial-"
_IGNORED = frozenset({".gitignore", ".gitkeep", ".DS_Store"})


@contextmanager
def staged_output(folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends without an error, its entries appear in ``folder``.

    Until then an earlier output stays as it is. With ``overwrite`` the entries of an earlier output of the same kind
    (:data:`WRITTEN`) give way to the new ones; every other file stays. Links are replaced, never followed. After an
    error the new files are removed, but for trained weights: where they lie is printed.

    Raises:
        OutputError: before the block: ``folder`` holds an output and ``overwrite`` is false; it holds one of another
            kind, or files that are not pyra's (even with ``overwrite``); it lies inside another output (an export may);
            it is a file, cannot be created, or is a place no output belongs: the root, the home folder or one above it,
            the root of a git checkout. After it: another process has written there meanwhile (its files and the new
            ones are both kept).
    """
    folder = Path(folder).expanduser()
    try:
        existed = folder.is_dir()
        _refuse_dangerous(folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(folder, kind, overwrite)
        staging = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
        write_json(staging / CLAIM_FILE, {"kind": kind, "date": _now()})
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {folder}: {reason}; choose another --output") from None
    keep = False
    try:
        yield staging
        if not overwrite and _earlier(folder, kind, True) != earlier:
            keep = True
            raise OutputError(f"{folder} was written by another process meanwhile; this output is kept in {staging}")
        _swap_in(staging, folder, kind)
    except BaseException:
        wanted = _WORTH_KEEPING.get(kind)
        if not keep and wanted is not None and (staging / wanted).exists():
            print(f"what was trained so far is kept in {staging}", file=sys.stderr)
        elif not keep:
            shutil.rmtree(staging, ignore_errors=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _earlier(folder: Path, kind: Kind, overwrite: bool) -> bool:
    """Whether ``folder`` holds an earlier output of this kind; raises :class:`OutputError` where it may not be used."""
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.name not in _IGNORED and not entry.name.startswith(_PARTIAL)
    )
    if not names:
        return False
    found = _kind_of(folder)
    if found is None:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise OutputError(
            f"{folder} holds files that are not from pyra ({listed}): choose another --output; "
            f"--overwrite only replaces an earlier {kind}"
        )
    if found != kind:
        raise OutputError(f"{folder} holds a {found}, not a {kind}: choose another --output")
    if not overwrite:
        raise OutputError(f"{folder} already holds a {kind}: pass --overwrite to replace it or choose another --output")
    for name, known in _INSIDE.items():
        if name in names and (folder / name).is_dir() and not (folder / name).is_symlink():
            foreign = sorted(entry.name for entry in (folder / name).iterdir() if entry.name not in known)
            if foreign and name in WRITTEN[kind]:
                raise OutputError(
                    f"{folder / name} holds files that are not from pyra ({', '.join(foreign[:3])}) and would be "
                    "replaced: move them, or choose another --output"
                )
    return True


def _kind_of(folder: Path) -> str | None:
    try:
        claim = json.loads((folder / CLAIM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = claim.get("kind") if isinstance(claim, dict) else None
    return kind if kind in WRITTEN else None


def _swap_in(staging: Path, folder: Path, kind: Kind) -> None:
    """Put the entries of ``staging`` in the place of the earlier ones; all go back where one rename fails."""
    aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moved.append((source, target))

    try:
        for entry in list(folder.iterdir()):
            if any(fnmatch.fnmatch(entry.name, pattern) for pattern in WRITTEN[kind]):
                move(entry, aside / entry.name)
        for entry in list(staging.iterdir()):
            if entry.name != CLAIM_FILE:
                move(entry, folder / entry.name)
        os.replace(staging / CLAIM_FILE, folder / CLAIM_FILE)  # last: the folder is never without one
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        aside.rmdir()
        raise
    staging.rmdir()
    shutil.rmtree(aside)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _refuse_dangerous(folder: Path, kind: Kind) -> None:
    real, home = folder.resolve(), Path.home().resolve()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; --output names a folder")
    if real == Path(real.anchor):
        place = "the root of the file system"
    elif real == home or real in home.parents:
        place = "the home folder or one above it"
    elif (real / ".git").exists():
        place = "the root of a git checkout"
    else:
        around = next((above for above in real.parents if _kind_of(above) is not None), None)
        if around is not None and kind != "export":  # an export belongs into its run
            raise OutputError(f"{folder} lies inside another output of pyra, {around}: choose another --output")
        return
    raise OutputError(f"{folder} is {place}: choose a folder inside it, such as {folder / 'runs' / 'first'}")
