"""The tokenizer of an engine checkpoint: its files as they are, named so that older transformers open them, too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pyra.errors import ExportError
from pyra.files import read_object, write_json, write_text

FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
"""Names of what a tokenizer is made of; code is never carried along."""

PROBES = (
    "The answer is 42.",
    "Tom has 3 apples and buys 4 more.\n\nHow many are there?  Let's see: 3 + 4 = 7",
    "Naïve café, 東京で 12345 €: don't!",
)
"""Texts that both tokenizers read."""

_CONFIG, _TEMPLATE, _GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # transformers 5's name, and what 4 calls it


def write_tokenizer(tokenizer: Any, source: Path | None, model: Any, folder: Path) -> dict[str, Any]:
    """Put a tokenizer's files and ``generation_config.json`` into a folder.

    Args:
        tokenizer: that the model was trained with.
        source: folder its files are copied from; None saves them from the tokenizer.
        model: whose ``generation_config`` is written where ``source`` has none.
        folder: to write to.

    Returns:
        ``files`` that were written, ``chat_template`` (whether there is one), ``same_ids``: whether transformers opens
        them as a tokenizer that gives every probe the ids of ``tokenizer``.

    Raises:
        ExportError: where no tokenizer can be opened from what was written.
    """
    found = [] if source is None else [name for name in FILES if (source / name).is_file()]
    if not any(name != _CONFIG for name in found):
        tokenizer.save_pretrained(folder)
    for name in found:
        shutil.copyfile(source / name, folder / name)  # type: ignore[operator]
    _name_the_class(folder)
    _keep_template(tokenizer, folder)
    if source is not None and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)
    elif getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    opened = open_tokenizer(folder)
    if getattr(opened, "chat_template", None) != getattr(tokenizer, "chat_template", None):
        raise ExportError(f"{folder}: the chat template did not come along; nothing was written")
    same = all(opened(text)["input_ids"] == tokenizer(text)["input_ids"] for text in PROBES)
    plain = all(_plain(opened, text) == _plain(tokenizer, text) for text in PROBES)
    if not plain:
        raise ExportError(f"{folder}: the tokenizer's files give other ids than the tokenizer; nothing was written")
    return {
        "files": sorted(path.name for path in folder.iterdir() if path.name in FILES),
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
        "same_ids": same,
    }


def open_tokenizer(folder: Path) -> Any:
    """Open a folder's tokenizer as an engine does; raises :class:`ExportError` where that fails."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of files that may hold anything
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"{folder}: its tokenizer cannot be opened ({said})") from None


def _plain(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _name_the_class(folder: Path) -> None:
    """Write the name that transformers 4 knows, which engines pin, for one that only transformers 5 has."""
    path = folder / _CONFIG
    if not path.is_file():
        return
    values = read_object(path, ExportError, "export again")
    if values.get("tokenizer_class") in _CLASSES:
        values["tokenizer_class"] = _CLASSES[values["tokenizer_class"]]
        write_json(path, values)


def _keep_template(tokenizer: Any, folder: Path) -> None:
    """Have the chat template that the tokenizer has, which may not be the one of its files."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or getattr(open_tokenizer(folder), "chat_template", None) == template:
        return
    (folder / "chat_template.json").unlink(missing_ok=True)
    if (folder / _CONFIG).is_file():
        values = read_object(folder / _CONFIG, ExportError, "export again")
        write_json(folder / _CONFIG, {key: value for key, value in values.items() if key != "chat_template"})
    write_text(folder / _TEMPLATE, template)
