"""``export.json``: what an exported folder holds, written last, read first.

A folder without one is unfinished or not ours. Sizes and digests of files tell a damaged copy before a
library chokes on it, or answers wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyra.checkpoints import file_digest
from pyra.errors import ExportError
from pyra.export.formats import FORMATS
from pyra.files import read_json
from pyra.records import record_problems

RECORD, CARD = "export.json", "README.md"
VERSION = 1
_LONGEST = 255  # bytes of a file name


@dataclass(frozen=True)
class ExportRecord:
    """What stands in ``export.json``.

    Attributes:
        format: one of :data:`~pyra.export.formats.FORMATS`.
        files: names and sizes in bytes.
        sha256: of each file; a record of an earlier version has none.
        input_shape: of one input, channels, height and width; the batch size is free.
        classes: length of the logits.
        schedule: tokens removed in each layer; None for a model that does not merge.
        rate: share of the MACs that are saved; None for a model that does not merge.
        metadata: text that came with the model, such as its class names.
        tolerance: that its comparisons held.
        megabytes: of all files.
        seconds: taken to export.
        comparisons: of the reloaded model with the one it came from.
        operators: of an ONNX graph.
        environment: versions that wrote it.
        version: of this record.
    """

    format: str
    files: dict[str, int]
    input_shape: list[int]
    classes: int
    schedule: list[int] | None = None
    rate: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0
    megabytes: float = 0.0
    seconds: float = 0.0
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    version: int = VERSION


def read_record(folder: Path) -> ExportRecord:
    """Read and check ``export.json`` of a folder.

    Raises:
        ExportError: where the folder holds no finished export, one of a newer version, or files that are not its.
    """
    path = folder / RECORD
    if not path.is_file():
        below = sorted(entry.parent.name for entry in folder.glob(f"*/{RECORD}")) if folder.is_dir() else []
        hint = f"it holds several: name one of {', '.join(below)}" if below else "give one that `pyra export` wrote"
        raise ExportError(f"{folder}: no {RECORD} there, so no finished export; {hint}")
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not a readable JSON file ({' '.join(str(error).split())[:200]})") from None
    version = values.get("version") if isinstance(values, dict) else None
    if type(version) is int and version > VERSION:
        raise ExportError(f"{path}: version {version} is newer than this library's ({VERSION}): upgrade pyra-adapt")
    problems = record_problems(ExportRecord, values) or _problems(ExportRecord(**values))
    if problems:
        raise ExportError(f"{path} describes no export: {'; '.join(problems[:8])}")
    record = ExportRecord(**values)
    for name, size in record.files.items():
        if name == CARD:  # whoever publishes the folder has more to say in it
            continue
        if not (folder / name).is_file():
            raise ExportError(f"{folder}: {name} is missing, which {RECORD} lists; export again")
        found = (folder / name).stat().st_size
        if found != size:
            raise ExportError(
                f"{folder / name} has {found} bytes, {RECORD} says {size}: it is damaged or another file; export again"
            )
        if name in record.sha256 and record.sha256[name] != file_digest(folder / name):
            raise ExportError(f"{folder / name} is not what was exported ({RECORD} has its SHA-256); export again")
    return record


def _problems(record: ExportRecord) -> list[str]:
    problems = []
    if record.format not in FORMATS:
        problems.append(f"format {record.format!r} is unknown; there is {', '.join(FORMATS)}")
    elif FORMATS[record.format].file not in record.files:
        problems.append(f"files leaves {FORMATS[record.format].file} out")
    problems += [
        f"{name[:80]!r} is no file name"
        for name in record.files
        if name != Path(name).name or name[:1] in ("", ".") or len(name.encode()) > _LONGEST
    ]
    problems += [f"{name!r} has the size {size!r}" for name, size in record.files.items() if type(size) is not int]
    if len(record.input_shape) != 3 or min(record.input_shape) < 1:
        problems.append(f"input_shape {record.input_shape!r} is not channels, height and width")
    if record.classes < 1:
        problems.append(f"classes is {record.classes}")
    problems += [f"metadata {key!r} is no text" for key, text in record.metadata.items() if not isinstance(text, str)]
    return problems
