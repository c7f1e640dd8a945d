"""The folder that a run or the demo writes: claimed once, refused where it holds somebody's files."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pyra.errors import OutputError
from pyra.files import write_json
from pyra.tasks.results import RESULT_FILE

CLAIM_FILE = ".pyra-run"
"""Written when a folder is claimed: an unfinished run is told from somebody's files by it."""

RUN_FILES = (RESULT_FILE, "options.json", "labels.json", "adapter", "evaluation.json", "export", "checkpoints")
"""What a run writes into its folder; only these are ever removed."""

_IGNORED = frozenset({".gitignore", ".gitkeep", ".DS_Store"})


def claim_output(
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    marker: str = RESULT_FILE,
    ours: Sequence[str] = RUN_FILES,
) -> Path:
    """Create ``folder`` for a new run, or empty the one of an earlier run of what pyra wrote; return its path.

    A folder is an earlier run when it holds ``marker`` or the claim file every claim leaves. With ``overwrite`` its
    entries named in ``ours``, and ``marker``, are removed; every other file stays. Links are removed, never followed.

    Raises:
        OutputError: the folder holds an earlier run and ``overwrite`` is false; it holds files and no run (even with
            ``overwrite``: nothing says they are pyra's); it is a file, cannot be created, or is a place no run
            belongs: the root, the home folder or one above it, the root of a git checkout.
    """
    folder = Path(folder)
    _refuse_dangerous(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry for entry in folder.iterdir() if entry.name not in _IGNORED)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    names = [entry.name for entry in entries]
    if names and not {marker, CLAIM_FILE} & set(names):
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise OutputError(
            f"{folder} holds files that are not from a pyra run ({listed}): choose another --output; "
            "--overwrite only replaces an earlier run"
        )
    if names and not overwrite:
        state = "a finished run" if marker in names else "an unfinished run"
        raise OutputError(f"{folder} already holds {state}: pass --overwrite to replace it or choose another --output")
    try:
        write_json(folder / CLAIM_FILE, {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
        for entry in entries:
            if entry.name in (marker, *ours):
                _remove(entry)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error}; choose another --output") from error
    return folder


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _refuse_dangerous(folder: Path) -> None:
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
        return
    raise OutputError(f"{folder} is {place}: choose a folder inside it, such as {folder / 'runs' / 'first'}")
