"""Chats as token ids: the prompt as it is given where the assistant is to go on, and what it should say after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pyra.errors import ConfigError, DataError
from pyra.tasks.language.tokens import IGNORED, Answered, Encoder, common_length
from pyra.tasks.posttraining.chat import Chat, Message

Source = TypeVar("Source")
Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class Kept:
    """Rows that are short enough to be read.

    Attributes:
        rows: token ids of prompts and answers.
        left_out: how many were longer.
    """

    rows: list[Answered]
    left_out: int

    @property
    def answer_tokens(self) -> int:
        """Tokens that a loss is taken of."""
        return sum(len(row.ids) - row.start for row in self.rows)


def encode_chats(chats: Sequence[Chat], encoder: Encoder, max_length: int, turns: str = "all") -> Kept:
    """Encode chats: a row for each turn of the assistant, with all that was said before as its prompt, or the last.

    One row a turn, and not one with several turns that count: what merges is a prompt as a whole, and templates may
    write earlier turns in another way than the one that is being answered (without what was thought).

    Args:
        chats: of :func:`pyra.tasks.posttraining.chat.read_chats`.
        encoder: with a chat template.
        max_length: tokens of a row; longer ones are left out.
        turns: ``all`` or ``last``.

    Raises:
        DataError: where the template fails on a chat; it is named.
        ConfigError: where every row is longer.
    """
    rows: list[Answered] = []
    for chat in chats:
        places = [place for place, one in enumerate(chat.messages) if one["role"] == "assistant" and place]
        for place in places if turns == "all" else places[-1:]:
            rows.append(_named(chat.source, lambda: encode_turn(chat.messages[: place + 1], chat.values, encoder)))  # noqa: B023
    return kept_rows(rows, max_length)


def kept_rows(rows: Sequence[Answered], max_length: int) -> Kept:
    """Leave out what is longer; raises :class:`ConfigError` where all is."""
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        raise ConfigError(f"--max-length {max_length}: every example is longer, with its prompt; raise it")
    return Kept(kept, len(rows) - len(kept))


def encode_turn(messages: Sequence[Message], values: Mapping[str, Any], encoder: Encoder) -> Answered:
    """Encode a chat that ends with a turn of the assistant.

    The prompt is what the template writes where the assistant is to go on. The answer is what follows it in the whole
    chat; of a template that writes the whole chat in another way (without an empty block of thoughts, say) it is the
    turn's text and what ends it. Where nothing ends it, the end-of-text token does.

    Raises:
        ValueError: where the template fails, or does not write the turn's text.
    """
    prompt = encoder.chat_text(messages[:-1], asks=True, values=values)
    whole = encoder.chat_text(messages, values=values)
    said = messages[-1]["content"].strip()
    shared = len(prompt) if whole.startswith(prompt) else common_length(prompt, whole)
    # What was thought may be written by the prompt already: the text may begin before the prompt ends.
    found = whole.find(said, max(0, shared - len(said)))
    answer = whole[len(prompt) :] if shared == len(prompt) else whole[found:] if found >= 0 else ""
    rest = _behind(whole[max(0, shared - len(said)) :], said)
    if not answer.strip() or rest is None:
        raise ValueError("the chat template leaves out what the assistant says, or writes it in other words")
    row = encoder.going_on(prompt, answer)
    ended = whole[found + len(said) :].strip() if found >= 0 else rest
    return row if ended else Answered([*row.ids, *encoder.end], row.start)


def _behind(text: str, said: str) -> str | None:
    """Return what follows the last line of what is said, spaces aside; None where a text does not hold that line.

    Thoughts before it may be written otherwise.
    """
    _, line, rest = "".join(text.split()).rpartition("".join(said.splitlines()[-1].split()))
    return rest if line else None


def labelled(row: Answered) -> dict[str, list[int]]:
    """Return a row as a trainer takes it: no loss is taken of the prompt."""
    return {"input_ids": row.ids, "labels": [IGNORED] * row.start + row.ids[row.start :]}


def _named(source: str, make: Callable[[], Encoded]) -> Encoded:
    try:
        return make()
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None
