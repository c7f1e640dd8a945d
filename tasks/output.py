"""The folder that a run, a demonstration or an export writes: filled beside what is there, swapped in when complete.

Every such folder holds a claim file that says what it is; a folder without one is somebody's own and is never written.
"""

from __future__ import annotations

import datetime
import fcntl
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

Kind = Literal["run", "trial", "experiment", "sweep", "demo", "export", "compression"]

WRITTEN: dict[Kind, tuple[str, ...]] = {
    "run": (
        RESULT_FILE,
        "options.json",
        "labels.json",
        "data.json",
        "backbone.json",
        "chat_template.jinja",
        "training.json",
        "predictions*.json",
        "logs",
        "adapter",
        "evaluation*.json",
        "lm-eval*.json",
        "export",
    ),
    "trial": ("options.json", "data.json", "trial.json", "logs"),
    "experiment": ("experiment.json", "selection.json", "summary.md", "trials", "linear", "seed-*"),
    "sweep": ("sweep.json", "report.html", "report.md", "front.png", "runs", "failures", "jobs", "pictures"),
    "demo": ("demo.json", "demo.md", "pareto.png", "pareto.html", "merged_tokens.png", "adapted", "export"),
    "export": (
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "config.json",
        "README.md",
        "export.json",
        "measured.json",
        "engine.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "model.gguf",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
    ),
    "compression": (
        "compression.json",
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
        "evaluation*.json",
        "predictions*.json",
    ),
}
"""What each kind writes, as patterns; nothing else is ever removed."""

_INSIDE: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "pyra_config.json", "README.md"),
    "export": (*WRITTEN["export"], CLAIM_FILE),
}
"""What pyra writes into folders of an output; with anything else in them they are not replaced."""

_CHECKPOINTS = "checkpoints"
_COMPLETE = f"{_CHECKPOINTS}/checkpoint-*/complete.json"
_WORTH_KEEPING: dict[Kind, tuple[str, ...]] = {"run": ("adapter", _COMPLETE), "trial": (_COMPLETE,)}
"""What an interrupted output is kept for, as patterns."""

_PARTIAL = ".partial-"
_LOCK, _JOURNAL, _REPLACED = ".lock", ".swap.json", ".replaced"
_OWN = frozenset({CLAIM_FILE, _LOCK, _JOURNAL, _REPLACED})
_IGNORED = frozenset({".gitignore", ".gitkeep", ".DS_Store"})


@contextmanager
def staged_output(
    folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, resumed: Path | None = None
) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends without an error, its entries appear in ``folder``.

    Until then an earlier output stays as it is. With ``overwrite`` the entries of an earlier output of the same kind
    (:data:`WRITTEN`) give way to the new ones; every other file stays. Links are replaced, never followed. After an
    error the new files are removed, but for trained weights and checkpoints: where they lie is printed. What a killed
    process left is put right first: a swap that had begun is ended, and folders worth nothing are removed.

    Args:
        folder: of the output.
        kind: of output.
        overwrite: replace an earlier one.
        resumed: one of :func:`unfinished` to go on with, instead of an empty folder.

    Raises:
        OutputError: before the block: ``folder`` holds an output and ``overwrite`` is false; it holds one of another
            kind, or files that are not pyra's (even with ``overwrite``); it lies inside another output (an export may);
            it is a file, cannot be created, or is a place no output belongs: the root, the home folder or one above it,
            the root of a git checkout; ``resumed`` is in use. After it: another process has written there meanwhile
            (its files and the new ones are both kept).
    """
    folder = Path(folder).expanduser()
    try:
        existed = folder.is_dir()
        _refuse_dangerous(folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        put_right(folder, kind)
        earlier = _earlier(folder, kind, overwrite)
        if resumed is None and (left := unfinished(folder, kind)):
            print(
                f"note: {left[0]} is interrupted and stays; --resume goes on with it, this starts anew", file=sys.stderr
            )
        staging = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder)) if resumed is None else resumed
        lock = _locked(staging)
        if lock is None:
            raise OutputError(f"another process is writing {staging}: wait for it, or choose another --output")
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
        if not keep and _worth_keeping(staging, kind):
            print(f"what was trained so far is kept in {staging}; --resume goes on with it", file=sys.stderr)
        elif not keep:
            shutil.rmtree(staging, ignore_errors=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        os.close(lock)


def check_output(folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False) -> None:
    """Raise the :class:`OutputError` that :func:`staged_output` would begin with; nothing is written.

    For work that takes long before it has something to write.
    """
    folder = Path(folder).expanduser()
    try:
        _refuse_dangerous(folder, kind)
        if folder.is_dir():
            _earlier(folder, kind, overwrite)
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OutputError(f"cannot write to {folder}: {reason}; choose another --output") from None


@contextmanager
def held_output(
    folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Yield the folder of :func:`claimed_output`, and keep other processes out of it, before anything is removed.

    Raises:
        OutputError: as of :func:`claimed_output`, and where another process is at work in the folder.
    """
    folder = Path(folder).expanduser()
    try:
        existing = folder.is_dir()
    except (OSError, RuntimeError) as error:  # links that lead in a circle, names that are too long
        raise OutputError(
            f"cannot write to {folder}: {' '.join(str(error).split())}; choose another --output"
        ) from None
    if existing and _kind_of(folder) == kind:
        with held(folder):
            yield claimed_output(folder, kind, overwrite, resume)
    else:
        claimed = claimed_output(folder, kind, overwrite, resume)
        with held(claimed):
            yield claimed


def claimed_output(folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, resume: bool = False) -> Path:
    """Return a folder for outputs of several runs, each of which is written on its own, marked as ours.

    With ``overwrite`` what an earlier one of the same kind wrote is removed; with ``resume`` it stays.

    Raises:
        OutputError: as of :func:`staged_output`, before its block.
    """
    folder = Path(folder).expanduser()
    try:
        _refuse_dangerous(folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        if _earlier(folder, kind, overwrite or resume) and not resume:
            for entry in [e for e in folder.iterdir() if any(fnmatch.fnmatch(e.name, p) for p in WRITTEN[kind])]:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        write_json(folder / CLAIM_FILE, {"kind": kind, "date": _now()})
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the hold ends with the process, however it ends.

    Raises:
        OutputError: where another process has it.
    """
    lock = _locked(folder)
    if lock is None:
        raise OutputError(f"another process is at work in {folder}: wait for it, or choose another --output")
    try:
        yield
    finally:
        os.close(lock)


def unfinished(folder: str | os.PathLike[str], kind: Kind) -> list[Path]:
    """Return what interrupted outputs of a kind left below ``folder``, the newest first; those in use are left out."""
    folder = Path(folder).expanduser()
    found = [entry for entry in folder.glob(f"{_PARTIAL}*") if _kind_of(entry) == kind and _worth_keeping(entry, kind)]
    return sorted(
        (entry for entry in found if not _in_use(entry)), key=lambda entry: entry.stat().st_mtime, reverse=True
    )


def put_right(folder: Path, kind: Kind) -> None:
    """End a swap that was cut off, and remove what interrupted outputs left that is worth nothing."""
    for entry in folder.glob(f"{_PARTIAL}*"):
        swapping = (entry / _JOURNAL).is_file()
        # The claim moves last: where it is gone from the entry, the folder has it.
        ours = folder if swapping and not (entry / CLAIM_FILE).exists() else entry
        if _kind_of(ours) != kind or entry.is_symlink() or _in_use(entry):
            continue
        if swapping:
            _go_on_swapping(entry, folder)
        elif not _worth_keeping(entry, kind):
            shutil.rmtree(entry, ignore_errors=True)


def _worth_keeping(staging: Path, kind: Kind) -> bool:
    return any(next(staging.glob(pattern), None) is not None for pattern in _WORTH_KEEPING.get(kind, ()))


def _locked(staging: Path) -> int | None:
    """Lock a folder against other processes; the lock ends with the process. None where another one has it."""
    handle = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _in_use(staging: Path) -> bool:
    try:
        lock = _locked(staging)
    except OSError:  # gone meanwhile, or not ours to write
        return True
    if lock is not None:
        os.close(lock)
    return lock is None


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
        raise OutputError(f"{folder} holds {_a(found)}, not {_a(kind)}: choose another --output")
    if not overwrite:
        going_on = "--resume to go on with it, " if kind == "experiment" else ""
        raise OutputError(
            f"{folder} already holds {_a(kind)}: pass {going_on}--overwrite to replace it or choose another --output"
        )
    for name, known in _INSIDE.items():
        if name in names and (folder / name).is_dir() and not (folder / name).is_symlink():
            foreign = _foreign(folder / name, known)
            if foreign and name in WRITTEN[kind]:
                raise OutputError(
                    f"{folder / name} holds files that are not from pyra ({', '.join(foreign[:3])}) and would be "
                    "replaced: move them, or choose another --output"
                )
    return True


def _foreign(folder: Path, known: tuple[str, ...]) -> list[str]:
    """Return the entries of a folder that pyra did not write; exports in folders of their own are looked into."""
    foreign = []
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and _kind_of(entry) == "export":
            foreign += [f"{entry.name}/{inner}" for inner in _foreign(entry, _INSIDE["export"])]
        elif entry.name in _IGNORED or entry.name.startswith(_PARTIAL):
            continue
        elif not any(fnmatch.fnmatch(entry.name, pattern) for pattern in known):
            foreign.append(entry.name)
    return sorted(foreign)


def _kind_of(folder: Path) -> str | None:
    try:
        claim = json.loads((folder / CLAIM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = claim.get("kind") if isinstance(claim, dict) else None
    return kind if kind in WRITTEN else None


def _swap_in(staging: Path, folder: Path, kind: Kind) -> None:
    """Put the entries of ``staging`` in the place of the earlier ones; all go back where one rename fails.

    A journal says what is to be moved, so that a swap whose process was killed can be ended by the next one.
    """
    old = [entry.name for entry in folder.iterdir() if any(fnmatch.fnmatch(entry.name, p) for p in WRITTEN[kind])]
    _sweep(staging)
    new = [entry.name for entry in staging.iterdir() if entry.name not in _OWN]
    (staging / _REPLACED).mkdir(exist_ok=True)
    write_json(staging / _JOURNAL, {"old": old, "new": new})
    _go_on_swapping(staging, folder)


def _sweep(staging: Path) -> None:
    """Remove what a killed process left of files it was writing, and checkpoints nobody goes on from any more."""
    shutil.rmtree(staging / _CHECKPOINTS, ignore_errors=True)
    for place in (staging, *(staging / name for name in _INSIDE if (staging / name).is_dir())):
        for entry in [e for e in place.iterdir() if e.name.startswith(".") and e.name not in _OWN]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _read_journal(staging: Path) -> dict[str, list[str]]:
    """Read what a swap was to move: names in the folder itself, never a path out of it."""
    try:
        journal = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
        lists = [journal["old"], journal["new"]]
        names = [name for names in lists for name in names]
        sound = all(isinstance(names, list) for names in lists) and all(
            isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name for name in names
        )
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise OutputError(f"{staging / _JOURNAL} is damaged: look at {staging}, remove it, and start again")
    return {"old": lists[0], "new": lists[1]}


def _go_on_swapping(staging: Path, folder: Path) -> None:
    journal = _read_journal(staging)
    aside = staging / _REPLACED
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moved.append((source, target))

    try:
        for name in journal["old"]:  # all of them before anything new comes
            if not os.path.lexists(aside / name):
                move(folder / name, aside / name)
        for name in journal["new"]:
            if os.path.lexists(staging / name):
                move(staging / name, folder / name)
        if (staging / CLAIM_FILE).exists():
            os.replace(staging / CLAIM_FILE, folder / CLAIM_FILE)  # last: the folder is never without one
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        (staging / _JOURNAL).unlink()
        raise
    shutil.rmtree(staging)


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
        if (
            around is not None and kind != "export" and _kind_of(around) not in ("experiment", "sweep")
        ):  # an export is of its run
            raise OutputError(f"{folder} lies inside another output of pyra, {around}: choose another --output")
        return
    raise OutputError(f"{folder} is {place}: choose a folder inside it, such as {folder / 'runs' / 'first'}")


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
