"""The result of one run and where it was measured: ``result.json`` of a run folder, schema version 1."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError, DataError
from pyra.files import read_json
from pyra.records import record_problems

SCHEMA_VERSION = 1
RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One row of every table and plot: what was run, how good it is, what it costs, where it was measured.

    ``value`` is a fraction for accuracies (0.683, not 68.3); higher is better. ``macs`` and ``plain_macs`` count one
    image with and without token merging; ``rate`` = 1 - ``macs`` / ``plain_macs``; ``schedule`` holds the tokens
    removed in each layer. ``images_per_second`` and ``speedup`` (against the unmerged backbone, same machine and
    batch) are None when not measured. ``epochs`` may be a fraction; ``train_seconds`` is wall-clock time.

    >>> row = RunResult(task="demo", method="lora", metric="accuracy", value=0.5, macs=10, schedule=[0], rate=0.0,
    ...                 trained_parameters=3, seed=0)
    >>> RunResult.from_dict(row.to_dict()) == row
    True
    """

    task: str
    method: str
    metric: str
    value: float
    macs: int
    schedule: list[int]
    rate: float
    trained_parameters: int
    seed: int
    images_per_second: float | None = None
    speedup: float | None = None
    backbone: str | None = None
    image_size: int | None = None
    batch_size: int | None = None
    throughput_batch_size: int | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    num_test: int | None = None
    skipped_images: int = 0
    protocol: str | None = None
    plain_macs: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ConfigError: all problems at once: unknown or missing keys, values of a wrong type, a newer schema.
        """
        version = data.get("schema_version", SCHEMA_VERSION)
        problems = []
        if type(version) is int and version > SCHEMA_VERSION:
            problems.append(f"schema version {version} is newer than {SCHEMA_VERSION}, the newest known: upgrade pyra")
        problems += record_problems(cls, data)
        if problems:
            raise ConfigError("not a result: " + "; ".join(problems))
        return cls(**data)


def read_result(folder: str | os.PathLike[str]) -> RunResult:
    """Read the result of a run folder.

    Raises:
        DataError: there is no readable result; the message names the file.
        ConfigError: the file is not a result of this schema; the message names the file and all problems.
    """
    path = Path(folder) / RESULT_FILE
    try:
        data = read_json(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): is {folder} the folder of a finished run?"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a result is a JSON object, this is a {type(data).__name__}")
    try:
        return RunResult.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def environment(device: str | None = None) -> dict[str, Any]:
    """Describe where a run happens: versions, device name, CPU threads, commit of the code, UTC date (ISO 8601).

    ``device`` is a torch device string; None means the CPU. Libraries that are not installed are None, as are the
    commit and its dirty flag where the code does not run from a checkout.
    """
    import torch

    accelerator = device is not None and torch.device(device).type == "cuda"
    commit, dirty = _commit()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "timm", "transformers", "peft")},
        "pyra": _version("pyra-adapt"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if accelerator else _cpu_name(),
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), None) or platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout this code (or, for an installed copy, the working directory) is in."""
    code = Path(__file__).resolve().parent
    start = Path.cwd() if "site-packages" in code.parts else code
    root = next((p for p in (start, *start.parents) if (p / ".git").exists()), None)
    if root is None or not _is_pyra(root):
        return None, None

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _is_pyra(root: Path) -> bool:
    try:
        return '"pyra-adapt"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False
