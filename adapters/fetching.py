"""Where an adapter lies: a folder, or a repository of the hub that is fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from pyra.adapters.folder import PEFT_FILE, PYRA_FILE, WEIGHTS, one_line
from pyra.errors import CheckpointError, ConfigError


def local_folder(folder: str | Path, revision: str | None = None) -> Path:
    """Return a folder as it is, and for ``"owner/name"`` that is none the hub's files of that name, fetched.

    Nothing but weights in safetensors and the two JSON files is fetched.

    Raises:
        CheckpointError: where the hub has no such repository, or cannot be reached.
        ConfigError: where ``folder`` is no path, or ``revision`` no text.
    """
    if not isinstance(folder, (str, Path)) or not isinstance(revision, (str, type(None))):
        raise ConfigError(f"an adapter is a folder, or 'owner/name' on the hub; got {folder!r}, revision {revision!r}")
    path = Path(folder)
    if os.path.exists(path) or re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) is None or str(folder).startswith("."):
        return path
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=[WEIGHTS, PEFT_FILE, PYRA_FILE]))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"{folder} is no folder here, and the hub did not give a repository of that name: {one_line(error)}"
        ) from None
