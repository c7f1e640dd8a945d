"""Whether an ExportedProgram from a file is data only.

``torch.export.load`` trusts its file: it unpickles what is marked as pickled, evaluates expressions of sizes, calls
whatever function of torch a node names, and makes Python source of guards and names. So every part of the archive is
held against what :mod:`pyra.export.programs` writes before torch sees it, read by the reader that torch itself uses.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from pyra.errors import ExportError

_PROGRAM = "models/model.json"
_MEMBERS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|\.format_version|"
    r"\.storage_alignment"
)
_PLAIN = re.compile(r"[\w.+]*")
_TARGET = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|eq|ne|lt|le|gt|ge|getitem)")
_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save|_?load)\b")
_SIZE = re.compile(
    r"(?:Symbol\('[su]\d+'|Integer|Add|Mul|Max|Min|FloorDiv|Mod|positive|integer|True|False|[-\d(),= ])*\)?"
)
_TREE = re.compile(r'"type": (?!null|"builtins\.(?:tuple|list|dict)")')


def refuse_code(path: Path) -> None:
    """Raise :class:`ExportError` where an archive holds anything that could run, or that we would not have written."""
    reader = PT2ArchiveReader(str(path))
    names = reader.get_file_names()
    for name in names:
        if _MEMBERS.fullmatch(name) is None:
            raise _refusal(path, f"{name} does not belong in it")
    if _PROGRAM not in names:
        raise ExportError(f"{path}: no program in it")
    inputs = reader.read_bytes("data/sample_inputs/model.pt")
    if inputs:
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except Exception:  # torch would go on to unpickle it
            raise _refusal(path, "its sample inputs are pickled objects") from None
    for part in ("weights", "constants"):
        config = json.loads(reader.read_string(f"data/{part}/model_{part}_config.json"))
        for key, payload in config["config"].items():
            stored = str(payload["path_name"])
            if payload["use_pickle"] is not False or re.fullmatch(r"(weight|tensor)_\d+", stored) is None:
                raise _refusal(path, f"{key!a} is stored pickled")
    program = json.loads(reader.read_string(_PROGRAM))
    if program.get("guards_code") or program["graph_module"].get("treespec_namedtuple_fields"):
        raise _refusal(path, "it brings guards or types of its own")
    for key, text in _texts(program):
        if not _is_plain(key, text):
            raise _refusal(path, f"{key} {text[:80]!a} is none that an exported model has")


def _is_plain(key: str, text: str) -> bool:
    if key in ("target", "as_operator"):
        return _TARGET.fullmatch(text) is not None and _FILES.match(text) is None
    if key == "expr_str":
        return _SIZE.fullmatch(text) is not None and "**" not in text
    if key in ("in_spec", "out_spec"):
        return _TREE.search(text) is None
    return _PLAIN.fullmatch(text) is not None


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a JSON value with the key it stands under; keys are texts too."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield "key", name
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _refusal(path: Path, reason: str) -> ExportError:
    return ExportError(f"{path} is refused, it could run code: {reason}; export the model again with pyra")
