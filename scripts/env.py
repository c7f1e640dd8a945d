"""``pyra env``: versions and hardware, as text or JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyra.scripts import cli

DISTRIBUTIONS = (
    "pyra-adapt",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "onnx",
    "onnxruntime",
)


@dataclasses.dataclass
class EnvOptions:
    """Options of ``pyra env``."""

    json: bool = dataclasses.field(default=False, metadata={"help": "print JSON"})


def main(argv: Sequence[str] | None = None) -> int:
    """Print the environment; return 0."""
    options = cli.parse(
        EnvOptions,
        argv,
        prog="pyra env",
        description="Show versions and hardware, for bug reports.",
        example="pyra env --json",
    )
    facts = environment()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts)) + 2
        print("\n".join(f"{name:<{width}}{'-' if value is None else value}" for name, value in facts.items()))
    return 0


def environment() -> dict[str, Any]:
    """Return name -> value; ``None`` marks what is not installed or not known.

    >>> environment()["python"].count(".")
    2
    """
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in DISTRIBUTIONS},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": ", ".join(names) or None,
        "git commit": _git_commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the source tree this package runs from, ``None`` for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return f"{commit} (modified)" if _git(root, "status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return result.stdout.strip()
