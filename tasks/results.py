"""The result of one run and where it was measured: ``result.json`` of a run folder, schema version 2.

torch is imported only where an environment is described: tables of results are made without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError, DataError
from pyra.files import read_json
from pyra.records import record_problems

SCHEMA_VERSION = 2
RESULT_FILE, PREDICTIONS_FILE = "result.json", "predictions.json"

PROTOCOLS = {
    "fixed": "hyper-parameters and epochs given beforehand, test split scored once",
    "validation": "chosen on the validation split, trained again on both, test split scored once",
    "published": "chosen on the test split",
}
"""Every name of a protocol, and what numbers made by it rest on."""

_LIBRARIES = (
    "torch", "timm", "transformers", "peft", "accelerate", "datasets", "evaluate", "torchvision", "safetensors",
)  # fmt: skip
_EVALUATED = re.compile(r"evaluation-rate-(0(?:\.\d+)?)\.json")
_OLD_SPLIT = re.compile(r"(\S+) split")  # version 1 said so where a protocol stands now


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One row of every table and plot: what was run, how good it is, what it costs, where it was measured.

    ``value`` is a fraction for accuracies (0.683, not 68.3). ``macs`` and ``plain_macs`` count one image with and
    without token merging; ``rate`` = 1 - ``macs`` / ``plain_macs``; ``schedule`` holds the tokens removed in each
    layer. ``images_per_second`` (of another ``unit`` where that says so) and ``speedup`` (against the unmerged
    backbone, same machine and batch) are None when not measured, as is whatever else was not. ``epochs`` may be a
    fraction; ``train_seconds`` is wall-clock time.

    Attributes:
        higher_is_better: direction of the metric.
        protocol: a name of :data:`PROTOCOLS`; a text in rows of schema version 1.
        selection: the rule by which hyper-parameters and epoch were chosen.
        chosen: what was chosen by it, and only that; ``epoch`` is the one whose weights were kept, of ``epochs``.
        settings: the options that decide the training, whatever they are; what differs only in ``seed`` is one method.
        adapter: ``peft`` and ``pyra``, the configurations of what was trained.
        split: that was scored.
        task_version: of the task's card.
        test_sha256: of the images and labels that were scored (:func:`pyra.tasks.data.task.split_digest`).
        train_sha256: of those that were trained on.
        preprocessing: how an image became the model's input, by name.
        data_source: ``shipped``, ``drawn``, the name of a folder, or a hub id.
        weights_sha256: of the backbone before adaptation, its new head left out
            (:func:`pyra.tasks.provenance.weights_digest`), or ``random`` for weights that were drawn anew.
        train_tokens: of the answers that were trained on, each example counted once, for decoders.
        answer_nll: mean negative log-likelihood of the right answers, in nats a token, for decoders.
        majority_value: score of always answering the most frequent training class.
        wall_seconds: of the whole piece of work, scoring and timing included.
        peak_memory_bytes: of the process (CPU) or of what torch allocated on the GPU.
        energy_joules: of what ``energy_of`` names, idle power and other users of it included.
        unit: what is counted in ``images_per_second``.
        note: what a reader of the row has to know besides.

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
    higher_is_better: bool = True
    images_per_second: float | None = None
    speedup: float | None = None
    unit: str = "images"
    backbone: str | None = None
    weights_sha256: str | None = None
    image_size: int | None = None
    preprocessing: str | None = None
    adapter: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    batch_size: int | None = None
    throughput_batch_size: int | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    energy_of: str | None = None
    num_test: int | None = None
    skipped_images: int = 0
    split: str = "test"
    task_version: str | None = None
    test_sha256: str | None = None
    train_sha256: str | None = None
    data_source: str | None = None
    train_tokens: int | None = None
    answer_nll: float | None = None
    majority_value: float | None = None
    protocol: str | None = None
    selection: str | None = None
    chosen: dict[str, Any] | None = None
    plain_macs: int | None = None
    note: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """Read what :meth:`to_dict` wrote.

        Older versions are migrated.

        Raises:
            ConfigError: all problems at once: unknown or missing keys, values of a wrong type or not finite, a newer
                schema.
        """
        version = data.get("schema_version", SCHEMA_VERSION)
        problems = []
        if type(version) is int and version > SCHEMA_VERSION:
            problems.append(f"schema version {version} is newer than {SCHEMA_VERSION}, the newest known: upgrade pyra")
        if version == 1:
            data = _from_version_1(data)
        problems += record_problems(cls, data)
        try:
            problems += [f"{name} holds too large a number" for name, value in data.items() if not _is_finite(value)]
        except RecursionError:
            problems.append("nested too deeply")
        if problems:
            raise ConfigError("not a result: " + "; ".join(problems))
        return cls(**data)


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row of schema version 1 into one of version 2.

    What version 1 did not record stays None; its protocol was a text, and is kept. An evaluation said in its place
    which split was scored, which is a field of its own now.
    """
    protocol = data.get("protocol")
    scored = _OLD_SPLIT.fullmatch(protocol) if isinstance(protocol, str) else None
    return {**data, "split": scored[1] if scored else "test", "schema_version": 2}


def _is_finite(value: object) -> bool:
    if isinstance(value, (int, float)):
        try:
            return math.isfinite(value)
        except OverflowError:  # a whole number that no float holds
            return False
    if isinstance(value, (list, tuple)):
        return all(_is_finite(item) for item in value)
    return all(_is_finite(item) for item in value.values()) if isinstance(value, dict) else True


def read_result(folder: str | os.PathLike[str]) -> RunResult:
    """Read the result of a run folder.

    Raises:
        DataError: there is no readable result; the message names the file.
        ConfigError: the file is not a result of this schema; the message names the file and all problems.
    """
    path = Path(folder) / RESULT_FILE
    if not path.exists():
        raise DataError(f"{path} cannot be read (No such file): is {folder} the folder of a finished run?")
    return read_result_file(path)


def read_result_file(path: Path) -> RunResult:
    """Read one row from a file; raises as :func:`read_result` does."""
    try:
        data = read_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a result is a JSON object, this is a {type(data).__name__}")
    try:
        return RunResult.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def evaluation_file(split: str, rate: float | None = None) -> str:
    """Name the file that ``pyra evaluate`` writes: ``evaluation.json``, with what was asked for in its name."""
    parts = (
        ["evaluation"]
        + ([split] if split != "test" else [])
        + ([f"rate-{rate_text(rate)}"] if rate is not None else [])
    )
    return f"{'-'.join(parts)}.json"


def rate_text(rate: float) -> str:
    """Return a rate as it was written, without an exponent.

    >>> rate_text(0.3), rate_text(0.0), rate_text(5e-05)
    ('0.3', '0', '0.00005')
    """
    text = f"{Decimal(repr(float(rate))):f}"
    return text.removesuffix(".0")


def evaluated_rate(file: Path) -> float | None:
    """Return the rate that an evaluation of the test split was asked for, by the name of its file; else None."""
    found = _EVALUATED.fullmatch(file.name)
    return float(found[1]) if found else None


def predictions_file(file: Path) -> Path:
    """Return where the answers stand that a result or an evaluation was counted from, beside it."""
    name = PREDICTIONS_FILE if file.name == RESULT_FILE else f"predictions-{file.name}"
    return file.with_name(name)


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
        **{name: _version(name) for name in _LIBRARIES},
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
