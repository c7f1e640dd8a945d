"""Atomic writes: a file is either the old one or the whole new one."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces ``path`` when the block ends without an error.

    An ``OSError`` of the block names ``path`` where it names no file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # of a write: which file it was is not said
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ``ValueError`` for what is no JSON, NaN, infinities and bottomless nesting included."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        value = json.loads(text, parse_constant=_no_number)
        if "\\ud" in text.lower():  # half of a character, which no file can be written with
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: str | Path, error: type[Exception], hint: str) -> dict[str, Any]:
    """Read a JSON file that holds an object; everything else is an ``error``, which a missing file gives a ``hint``."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise error(f"{Path(path).parent}: no {Path(path).name} there; {hint}") from None
    except (OSError, ValueError) as reason:
        raise error(f"{path}: not a readable JSON file ({' '.join(str(reason).split())[:200]})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; it is on the disk before it takes the place of what was there."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON types and dataclasses atomically, indented; refuses NaN and infinities (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_fields) + "\n")


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
