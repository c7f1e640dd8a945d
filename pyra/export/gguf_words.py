"""The tokenizer in a GGUF file: a byte-level BPE's tokens, merges and marks; of other kinds none."""

from __future__ import annotations

import json
from typing import Any

import gguf

# How llama.cpp splits a text before it merges: by the regular expressions of the tokenizer, which it knows by name.
_BY_PATTERN = (
    (r"\p{N}{1,3}", "[一-龥", "deepseek-v3"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}{1,3}", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}", "qwen2"),
)
UNKNOWN = "default"
_UNUSED = "[PAD{}]"  # as llama.cpp names ids that a model has and its tokenizer has not


def add_words(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """Write a tokenizer's keys.

    Args:
        writer: of the file.
        tokenizer: of transformers.
        vocabulary: tokens of the model.

    Returns:
        For the record: ``kind`` (``gpt2``, or ``none`` for a tokenizer that is no byte-level BPE), ``pre`` (how texts
        are split), ``note`` where a user should know something, ``chat_template``.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)
    told = {"chat_template": isinstance(template, str)}
    description = _description(tokenizer)
    if description is None:
        writer.add_tokenizer_model("no_vocab")
        note = "the tokenizer is no byte-level BPE and is not in the GGUF file: give llama.cpp token ids"
        return {"kind": "none", "note": note, **told}
    pre = split_name(description)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, kinds = _tokens(description, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(_pair(merge)) for merge in description["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        value = getattr(tokenizer, f"{name}_token_id", None)
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(int(value))
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    writer.add_add_bos_token(whole[: len(whole) - len(plain)] == [tokenizer.bos_token_id])
    found = {"kind": "gpt2", "pre": pre, **told}
    if pre == UNKNOWN:
        found["note"] = "how the tokenizer splits texts has no name here that llama.cpp knows: ids may differ there"
    return found


def split_name(description: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer of ``tokenizer.json`` splits texts; :data:`UNKNOWN` for none.

    >>> split_name({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}})
    'gpt-2'
    """
    splitter = description.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    patterns = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    regular = [step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
    digits = [step for step in steps if step.get("type") == "Digits"]
    if regular and not patterns:
        if not digits:
            return "gpt-2" if len(steps) == 1 else UNKNOWN
        return "smollm" if len(steps) == 2 and digits[0].get("individual_digits") else UNKNOWN
    text = "\n".join(patterns)
    return next((name for first, second, name in _BY_PATTERN if first in text and second in text), UNKNOWN)


def _description(tokenizer: Any) -> dict[str, Any] | None:
    """Return ``tokenizer.json`` of a byte-level BPE; None of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    found: dict[str, Any] = json.loads(backend.to_str())
    byte_level = "ByteLevel" in json.dumps(found.get("pre_tokenizer"))
    plain = (found.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"  # which llama.cpp leaves out
    return found if byte_level and plain and found["model"].get("type") == "BPE" else None


def _tokens(description: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    named = {index: (token, gguf.TokenType.NORMAL) for token, index in description["model"]["vocab"].items()}
    for added in description["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        named[added["id"]] = (added["content"], kind)
    rows = [named.get(index, (_UNUSED.format(index), gguf.TokenType.UNUSED)) for index in range(vocabulary)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]


def _pair(merge: Any) -> list[str]:
    """Return the two parts of a merge; a space inside one is written as byte-level tokenizers write it."""
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    return [part.replace(" ", chr(ord(" ") + 256)) for part in parts]
