"""Pairs of answers, of which one is preferred; every row that is none is named.

A row has ``prompt``, ``chosen`` and ``rejected``: text, or messages. Answers may be given as whole chats that begin
with the same prompt, which may then be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyra.errors import ConfigError, DataError
from pyra.tasks.language.tokens import Answered, Encoder
from pyra.tasks.posttraining.chat import COMMON, Message, as_messages, each, needed, row_values
from pyra.tasks.posttraining.encoding import encode_turn
from pyra.tasks.posttraining.rows import Row

KEYS = ("prompt", "chosen", "rejected", *COMMON)


@dataclass(frozen=True)
class Pair:
    """What is asked, and two answers.

    Attributes:
        prompt: turns.
        chosen: the turn that is preferred.
        rejected: the other one.
        values: what the chat template is given.
        source: what errors call it.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    values: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt with each of two answers."""

    chosen: Answered
    rejected: Answered


@dataclass(frozen=True)
class KeptPairs:
    """Pairs that are short enough to be read, and how many were longer."""

    pairs: list[EncodedPair]
    left_out: int

    @property
    def answers(self) -> list[Answered]:
        """Every answer: chosen and rejected in turn."""
        return [row for pair in self.pairs for row in (pair.chosen, pair.rejected)]


def read_pairs(rows: Sequence[Row], switch: str | None) -> list[Pair]:
    """Turn rows into pairs.

    Args:
        rows: that were read.
        switch: by which the template is told to think; None where it has none.

    Raises:
        DataError: naming the first rows that are none, and how many more there are.
    """
    return each(rows, lambda row: _pair(row, switch))


def encode_pairs(pairs: Sequence[Pair], encoder: Encoder, max_length: int) -> KeptPairs:
    """Encode pairs; those of which an answer is longer than ``max_length`` with its prompt are left out.

    Raises:
        DataError: where the template fails on a pair, or writes both answers the same; it is named.
        ConfigError: where all are longer.
    """
    found = [_encoded(pair, encoder) for pair in pairs]
    kept = [one for one in found if max(len(one.chosen.ids), len(one.rejected.ids)) <= max_length]
    if not kept:
        raise ConfigError(f"--max-length {max_length}: every pair is longer, with its prompt; raise it")
    return KeptPairs(kept, len(found) - len(kept))


def _encoded(pair: Pair, encoder: Encoder) -> EncodedPair:
    try:
        chosen, rejected = (
            encode_turn([*pair.prompt, one], pair.values, encoder) for one in (pair.chosen, pair.rejected)
        )
    except ValueError as error:
        raise DataError(f"{pair.source}: {error}") from None
    start = min(chosen.start, rejected.start)
    if chosen.ids == rejected.ids:
        raise DataError(f"{pair.source}: chosen and rejected are the same to the tokenizer, there is nothing to prefer")
    return EncodedPair(Answered(chosen.ids, start), Answered(rejected.ids, start))


def _pair(row: Row, switch: str | None) -> Pair:
    chosen, rejected = needed(row.values, ("chosen", "rejected"))
    before, good = _answer(chosen, "chosen")
    other, bad = _answer(rejected, "rejected")
    if before != other:
        raise ValueError("chosen and rejected answer different prompts")
    asked = row.values.get("prompt")
    prompt = before if asked is None else as_messages(asked, "prompt", "user")
    if not prompt:
        raise ValueError("no prompt: give prompt, or chosen and rejected as whole chats")
    if before and before != prompt:
        raise ValueError("prompt is not what chosen and rejected begin with")
    if prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant: chosen and rejected answer somebody else")
    if good["content"].strip() == bad["content"].strip():
        raise ValueError("chosen and rejected are the same, there is nothing to prefer")
    return Pair(prompt, good, bad, row_values(row.values, switch), row.source)


def _answer(value: Any, name: str) -> tuple[list[Message], Message]:
    """Return the turns before an answer, and the answer."""
    messages = as_messages(value, name, "assistant")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with {messages[-1]['role']}: it must end with the assistant's answer")
    return messages[:-1], messages[-1]
