"""Rows become chats and preferences, or one line says why not."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_chats import as_rows

from pyra.errors import DataError
from pyra.tasks.posttraining.chat import read_chats
from pyra.tasks.posttraining.preferences import read_pairs

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def test_messages_and_prompts() -> None:
    rows = as_rows(
        [
            {"messages": [USER, BOT], "id": 3},
            {"prompt": "hi", "completion": "yo", "messages": None},
            {"prompt": [USER], "completion": [BOT]},
            {"prompt": [{"role": "system", "content": "be kind"}, USER], "completion": "yo", "thinking": False},
            {"messages": [USER, BOT], "chat_template_kwargs": {"date": "today", "think": None}},
        ]
    )
    chats = read_chats(rows, "enable_thinking")
    assert [chat.messages for chat in chats[:3]] == [[USER, BOT]] * 3
    assert [one["role"] for one in chats[3].messages] == ["system", "user", "assistant"]
    assert [chat.values for chat in chats] == [{}, {}, {}, {"enable_thinking": False}, {"date": "today"}]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "no messages, nor prompt and completion (it is empty)"),
    ({"mesages": [USER, BOT]}, "no messages, nor prompt and completion (it has mesages) (did you mean 'messages'?)"),
    ({"prompt": "hi"}, "no messages, nor prompt and completion (it has prompt)"),
    ({"completion": "yo"}, "no prompt (it has completion)"),
    ({"messages": "hi"}, "messages is a text, expected a list of messages"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [USER]}, "the last message is of user: a chat ends with the assistant's answer"),
    ({"messages": [BOT]}, "the assistant speaks first"),
    ({"messages": [USER, "yo"]}, "message 2 of messages is a text, expected an object with role and content"),
    ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 of messages has no role (it has from, value)"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 of messages has no content (it has role)"),
    ({"messages": [USER, {"role": "asistant", "content": "yo"}]}, "role 'asistant' is none of system, developer, user"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 of messages: content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": [1]}]}, "content is a list, expected text"),
    ({"prompt": "", "completion": "yo"}, "prompt is empty"),
    ({"prompt": "hi", "completion": 3}, "completion is a int, expected text or a list of messages"),
    ({"prompt": "hi", "completion": [USER]}, "the last message is of user"),
    ({"messages": [USER, BOT], "thinking": "yes"}, "thinking is 'yes', expected true or false"),
    ({"messages": [USER, BOT], "thinking": True}, "the chat template heeds neither enable_thinking nor thinking"),
    ({"messages": [USER, BOT], "chat_template_kwargs": "x"}, "chat_template_kwargs is a text, expected an object"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_rows_that_are_no_chats(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_chats(as_rows([{"messages": [USER, BOT]}, row]), None)
    text = str(caught.value)
    assert text.startswith("f.jsonl, line 2: ") and message in text and "\n" not in text


def test_a_row_that_contradicts_itself() -> None:
    row = {"messages": [USER, BOT], "thinking": True, "chat_template_kwargs": {"thinking": False}}
    with pytest.raises(DataError, match="thinking is true, chat_template_kwargs says False"):
        read_chats(as_rows([row]), "thinking")


def test_many_wrong_rows_are_counted() -> None:
    with pytest.raises(DataError, match=r"line 1: .*; f.jsonl, line 2: .*; f.jsonl, line 3: .*; and 7 more rows$"):
        read_chats(as_rows([{"messages": []}] * 10), None)


def test_preferences() -> None:
    other = {"role": "assistant", "content": "no"}
    rows = as_rows(
        [
            {"prompt": "hi", "chosen": "yo", "rejected": "no"},
            {"prompt": [USER], "chosen": [BOT], "rejected": [other]},
            {"chosen": [USER, BOT], "rejected": [USER, other]},
            {"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, other], "score": 3},
        ]
    )
    for pair in read_pairs(rows, None):
        assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], BOT, other)


WRONG_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "hi", "chosen": "yo"}, "no rejected (it has prompt, chosen)"),
    ({"prompt": "hi", "chosen": "yo", "rejcted": "no"}, "no rejected (it has prompt, chosen, rejcted) (did you mean"),
    ({"prompt": "hi"}, "no chosen and no rejected"),
    ({"chosen": "yo", "rejected": "no"}, "no prompt: give prompt, or chosen and rejected as whole chats"),
    ({"prompt": "hi", "chosen": "yo", "rejected": " yo\n"}, "chosen and rejected are the same"),
    ({"prompt": "hi", "chosen": "", "rejected": "no"}, "chosen is empty"),
    ({"prompt": "hi", "chosen": "yo", "rejected": []}, "rejected is empty"),
    ({"prompt": "hi", "chosen": [USER], "rejected": "no"}, "chosen ends with user"),
    ({"prompt": "ho", "chosen": [USER, BOT], "rejected": [USER, BOT]}, "prompt is not what chosen and rejected begin"),
    ({"chosen": [USER, BOT], "rejected": [USER, USER, BOT]}, "chosen and rejected answer different prompts"),
    ({"prompt": [USER, BOT], "chosen": "yo", "rejected": "no"}, "the prompt ends with the assistant"),
    ({"prompt": "hi", "chosen": "yo", "rejected": "no", "thinking": False}, "the chat template heeds neither"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_PAIRS)
def test_rows_that_are_no_preferences(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(as_rows([row]), None)
    text = str(caught.value)
    assert text.startswith("f.jsonl, line 1: ") and message in text and "\n" not in text
