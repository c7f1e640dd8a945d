"""Task files of lm-evaluation-harness from a folder, looked through before the harness reads them.

Such a file may name Python to be run: ``!function``, a class, a metric that ``evaluate`` fetches with its code,
generation by code of the hub. Where that was not asked for, the file is refused. Its templates are no plain text
either, and :func:`sandboxed` has the harness run them without reach into Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from pyra.errors import ConfigError, did_you_mean

_RUNS_CODE = frozenset(
    {"class", "custom_dataset", "custom_generate", "hf_evaluate", "trust_remote_code", "unsafe_code", "use_prompt"}
)
# Builders of the `datasets` library whose files can hold pickles; only its newer versions refuse those.
_UNPICKLED = frozenset({"pandas", "webdataset"})


class _Tagged(yaml.YAMLError):
    """A tag that asks for more than data."""


class _Loader(yaml.SafeLoader):
    """Modifications: a tag that YAML itself does not have is an error of its own."""


def _refuse_tag(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise _Tagged(str(node.tag))


_Loader.add_constructor(None, _refuse_tag)


def check_task_files(folder: Path, metrics: Collection[str]) -> None:
    """Refuse task files that run code.

    Args:
        folder: that holds them, at any depth.
        metrics: names that the harness computes itself.

    Raises:
        ConfigError: where the folder holds no task file, or one that runs code, is no YAML, or includes a file from
            elsewhere; all of them in one message.
    """
    if not folder.is_dir():
        raise ConfigError(f"--lm-eval-tasks {folder} is no folder: give one with task files (.yaml) of lm-eval")
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise ConfigError(f"--lm-eval-tasks {folder} holds no .yaml file")
    root, seen, problems = folder.resolve(), set[Path](), list[str]()
    while files:
        file = files.pop(0)
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        values, problem = _read(file)
        problems += [f"{file}: {text}" for text in ([problem] if problem else _problems(values, metrics))]
        includes = values.get("include", []) if isinstance(values, dict) else []
        for name in includes if isinstance(includes, list) else [includes]:
            included = file.parent / str(name)
            if not included.resolve().is_relative_to(root):
                problems.append(f"{file}: includes {name}, which lies outside")
            elif included.is_file():
                files.append(included)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"{'; '.join(problems[:5])}{more}: task files that run code are refused; read them, and where you trust "
            "them add --trust-task-code"
        )


def _read(file: Path) -> tuple[Any, str | None]:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader), None
    except _Tagged as error:
        return None, f"{error} names Python code"
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        return None, f"not readable ({' '.join(str(error).split())[:120]})"


def _problems(values: Any, metrics: Collection[str], inside: str = "") -> list[str]:
    """Look through everything in a file, whatever it is in."""
    if isinstance(values, dict):
        source = str(values.get("dataset_path"))
        found = [f"dataset_path {source} may unpickle"] if source in _UNPICKLED else []
        found += [f"{key} may run code" for key, value in values.items() if key in _RUNS_CODE and value]
        metric = values.get("metric")
        if isinstance(metric, str) and metric not in metrics and inside == "metric_list":
            close = did_you_mean(metric, metrics)
            found.append(f"metric {metric!r}{close} is none of the harness's own, and would be fetched as code")
        return found + [text for key, value in values.items() for text in _problems(value, metrics, str(key))]
    if isinstance(values, list):
        return [text for value in values for text in _problems(value, metrics, inside)]
    return []


@contextlib.contextmanager
def sandboxed(module: Any, name: str = "env") -> Iterator[None]:
    """Have a module's Jinja environment stand in a sandbox for the time of the block: its templates reach no Python.

    Args:
        module: that holds the environment.
        name: under which it is held.
    """
    own = getattr(module, name)
    safe = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
    safe.filters.update(own.filters)
    setattr(module, name, safe)
    try:
        yield
    finally:
        setattr(module, name, own)
