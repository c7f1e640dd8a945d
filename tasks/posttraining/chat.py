"""Chats from rows: what is asked, and what the assistant should say; every row that is none is named.

A row has ``messages`` (turns with ``role`` and ``content``, the last of them the assistant's), or ``prompt`` and
``completion``: text, which is a turn of the user and of the assistant, or messages. Beside them ``thinking`` (true or
false) sets the switch of the chat template, and ``chat_template_kwargs`` whatever else the template takes. Other keys
are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pyra.errors import DataError, did_you_mean
from pyra.tasks.language.thinking import SWITCHES
from pyra.tasks.posttraining.rows import Row

ROLES = ("system", "developer", "user", "assistant", "tool")
COMMON = ("thinking", "chat_template_kwargs")
"""Keys that every row may have."""
_SHOWN = 3

Message = dict[str, Any]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Chat:
    """What is said, and what the assistant answers.

    Attributes:
        messages: turns; the last is the assistant's.
        values: what the chat template is given for them.
        source: what errors call it.
    """

    messages: list[Message]
    values: Mapping[str, Any]
    source: str


def read_chats(rows: Sequence[Row], switch: str | None) -> list[Chat]:
    """Turn rows into chats.

    Args:
        rows: of :func:`pyra.tasks.posttraining.rows.read_rows`.
        switch: by which the template is told to think; None where it has none.

    Raises:
        DataError: naming the first rows that are none, what is wrong with each, and how many more there are.
    """
    return each(rows, lambda row: Chat(_messages_of(row.values), row_values(row.values, switch), row.source))


def each(rows: Sequence[Row], make: Callable[[Row], Made]) -> list[Made]:
    """Make something of every row.

    Args:
        rows: that were read.
        make: raises ``ValueError``, in words, for a row that it cannot make anything of.

    Raises:
        DataError: naming the first rows of which nothing was made, and counting the others.
    """
    made, problems = [], []
    for row in rows:
        try:
            made.append(make(row))
        except ValueError as error:
            problems.append(f"{row.source}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more rows" if len(problems) > _SHOWN else ""
        raise DataError("; ".join(problems[:_SHOWN]) + more)
    return made


def row_values(values: Mapping[str, Any], switch: str | None) -> dict[str, Any]:
    """Return what a row gives the chat template; raises ``ValueError`` for values that cannot be.

    Args:
        values: of the row.
        switch: by which the template is told to think; None where it has none.
    """
    given = values.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"chat_template_kwargs is a {_kind(given)}, expected an object")
    found = {key: value for key, value in (given or {}).items() if value is not None}
    thinking = values.get("thinking")
    if thinking is None:
        return found
    if not isinstance(thinking, bool):
        raise ValueError(f"thinking is {thinking!r}, expected true or false")
    if switch is None:
        raise ValueError(
            f"thinking is {str(thinking).lower()}, and the chat template heeds neither {' nor '.join(SWITCHES)}: leave "
            "it out, or give another --chat-template"
        )
    if found.get(switch, thinking) != thinking:
        raise ValueError(f"thinking is {str(thinking).lower()}, chat_template_kwargs says {found[switch]!r}")
    return found | {switch: thinking}


def as_messages(value: Any, name: str, role: str) -> list[Message]:
    """Return turns as they are, or a text as one turn; raises ``ValueError`` in words for anything else.

    Args:
        value: text, or a list of messages.
        name: of the key it stands under.
        role: of a text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name} is empty")
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{name} is a {_kind(value)}, expected text or a list of messages")
    if not value:
        raise ValueError(f"{name} is empty")
    for number, message in enumerate(value, 1):
        _check_message(message, f"message {number} of {name}")
    return [{key: one for key, one in message.items() if one is not None} for message in value]


def needed(values: Mapping[str, Any], names: Sequence[str], instead: str = "") -> list[Any]:
    """Return the values of keys that a row must have; raises ``ValueError`` in words where one is missing."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        others = [key for key in values if key not in COMMON]
        found = f"it has {', '.join(others[:5])}" if others else "it is empty"
        close = next((hint for key in others if (hint := did_you_mean(key, missing))), "")
        raise ValueError(f"no {' and no '.join(missing)}{instead} ({found}){close}")
    return [values[name] for name in names]


def _messages_of(values: Mapping[str, Any]) -> list[Message]:
    if values.get("messages") is not None or values.get("completion") is None:
        (given,) = needed(values, ("messages",), ", nor prompt and completion")
        if not isinstance(given, list):
            raise ValueError(f"messages is a {_kind(given)}, expected a list of messages")
        messages = as_messages(given, "messages", "user")
    else:
        asked, said = needed(values, ("prompt", "completion"))
        messages = [*as_messages(asked, "prompt", "user"), *as_messages(said, "completion", "assistant")]
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is of {messages[-1]['role']}: a chat ends with the assistant's answer")
    if messages[0]["role"] == "assistant":
        raise ValueError("the assistant speaks first: there is nothing that it answers")
    return messages


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is a {_kind(message)}, expected an object with role and content")
    missing = [name for name in ("role", "content") if message.get(name) is None]
    if missing:
        raise ValueError(f"{where} has no {missing[0]} (it has {', '.join(message) or 'nothing'})")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r} is none of {', '.join(ROLES)}{did_you_mean(str(role), ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: content is a {_kind(content)}, expected text")
    if not content.strip():
        raise ValueError(f"{where}: content is empty")


def _kind(value: object) -> str:
    return {type(None): "null", dict: "object", str: "text", bool: "boolean"}.get(type(value), type(value).__name__)
