"""What of a chat is learnt, whatever the template does with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chats import TEMPLATE, as_rows
from tiny_language import tokenizer

from pyra.errors import ConfigError, DataError
from pyra.tasks.language.tokens import IGNORED, Encoder
from pyra.tasks.posttraining.chat import Chat, read_chats
from pyra.tasks.posttraining.encoding import encode_chats, encode_turn, labelled
from pyra.tasks.posttraining.preferences import encode_pairs, read_pairs
from pyra.tasks.posttraining.templates import plain_template

TURN = "{{- '<|' + m['role'] + '|>' + m['content'] -}}"
OPEN = "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"


def encoder(template: str | None = TEMPLATE, *, end: bool = True) -> Encoder:
    words = tokenizer(end=end)
    words.chat_template = plain_template(words) if template is None else template
    return Encoder(words, chat=True)


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def learnt(found: Encoder, *turns: str, **values: Any) -> tuple[str, str]:
    """Return prompt and answer of the last turn, as text with special tokens."""
    row = encode_turn(said(*turns), values, found)
    return found.tokenizer.decode(row.ids[: row.start]), found.tokenizer.decode(row.ids[row.start :])


def test_only_the_answer_is_learnt() -> None:
    found = encoder()
    assert learnt(found, "hi", "yo") == ("<s><|user|>hi</s><|assistant|>", "yo</s>")
    row = labelled(encode_turn(said("hi", "yo"), {}, found))
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert found.tokenizer.decode(counted) == "yo</s>"


def test_the_plain_template() -> None:
    assert learnt(encoder(None), "hi", "yo", "and ?", "no") == (
        "<s>User: hi\nAssistant: yo</s>\nUser: and ?\nAssistant:",
        " no</s>",
    )
    assert learnt(encoder(None, end=False), "hi", "yo") == ("<s>User: hi\nAssistant:", " yo")


def test_the_prompt_is_the_one_of_generation() -> None:
    """Without thinking the prompt holds an empty block of thoughts, which the whole chat does not have."""
    found = encoder()
    assert learnt(found, "hi", "yo", thinking=False) == ("<s><|user|>hi</s><|assistant|><think></think>", "yo</s>")
    assert learnt(found, "hi", "yo", thinking=True) == ("<s><|user|>hi</s><|assistant|>", "yo</s>")
    # An answer whose letters stand in what surrounds it, too.
    assert learnt(found, "hi", "s", thinking=False)[1] == "s</s>"
    assert learnt(found, "assistant", "a", thinking=False)[1] == "a</s>"


def test_a_template_that_opens_the_thoughts_itself() -> None:
    opening = "{%- for m in messages -%}" + TURN + "{{- '!' -}}{%- endfor -%}" + OPEN.replace("|>'", "|><think>'")
    found = encoder(opening)
    assert learnt(found, "hi", "<think>well</think>yo") == ("<|user|>hi!<|assistant|><think>", "well</think>yo!")


def test_what_ends_an_answer() -> None:
    bare = "{%- for m in messages -%}" + TURN + "{%- endfor -%}" + OPEN
    assert learnt(encoder(bare), "hi", "yo")[1] == "yo</s>"
    assert learnt(encoder(bare, end=False), "hi", "yo")[1] == "yo"
    marked = "{%- for m in messages -%}" + TURN + "{{- '!' -}}{%- endfor -%}" + OPEN
    assert learnt(encoder(marked), "hi", "yo")[1] == "yo!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{- raise_exception('roles\n must alternate') -}}", "roles must alternate"),
        ("{%- for m in messages -%}{{- m['role'] -}}{%- endfor -%}" + OPEN, "leaves out what the assistant says"),
        ("{{- messages[5]['content'] -}}", "."),
    ],
)
def test_a_template_that_fails_names_the_chat(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode_chats([Chat(said("hi", "yo"), {}, "a.jsonl, line 7")], encoder(template), 100)
    assert str(caught.value).startswith("a.jsonl, line 7: ") and "\n" not in str(caught.value)


def test_every_turn_is_a_row_of_its_own() -> None:
    found = encoder()
    (chat,) = read_chats(as_rows([{"messages": said("a", "b", "c", "d", "e", "f")}]), None)
    every = encode_chats([chat], found, 100).rows
    assert [found.tokenizer.decode(row.ids[row.start :]) for row in every] == ["b</s>", "d</s>", "f</s>"]
    for row, number in zip(every, (2, 4, 6), strict=True):
        assert row == encode_turn(chat.messages[:number], {}, found)
    assert encode_chats([chat], found, 100, "last").rows == every[-1:]


def test_what_is_too_long_is_left_out() -> None:
    found = encoder()
    chats = [Chat(said("a " * number, "b"), {}, "x") for number in (1, 5, 50)]
    lengths = [len(row.ids) for row in encode_chats(chats, found, 1000).rows]
    kept = encode_chats(chats, found, lengths[1])
    assert ([len(row.ids) for row in kept.rows], kept.left_out, kept.answer_tokens) == (lengths[:2], 1, 4)
    with pytest.raises(ConfigError, match="--max-length 3: every example is longer"):
        encode_chats(chats, found, 3)


def test_pairs_share_their_prompt() -> None:
    found = encoder()
    rows = as_rows([{"prompt": "hi", "chosen": "a joy", "rejected": "a bore"}])
    (one,) = encode_pairs(read_pairs(rows, None), found, 100).pairs
    assert one.chosen.ids[: one.chosen.start] == one.rejected.ids[: one.rejected.start]
    assert found.tokenizer.decode(one.chosen.ids[one.chosen.start :]) == "a joy</s>"
    assert found.tokenizer.decode(one.rejected.ids[one.rejected.start :]) == "a bore</s>"
    with pytest.raises(ConfigError, match="--max-length 4: every pair is longer"):
        encode_pairs(read_pairs(rows, None), found, 4)
    squeezing = "{%- for m in messages -%}{{- '|' + m['content'] | replace('  ', ' ') -}}{%- endfor -%}"
    apart = as_rows([{"prompt": "hi", "chosen": "a b", "rejected": "a  b"}])
    with pytest.raises(DataError, match="line 1: chosen and rejected are the same to the tokenizer"):
        encode_pairs(read_pairs(apart, None), encoder(squeezing), 100)


@pytest.mark.parametrize(
    "written",
    [
        "{{ m['content'] if m['role'] == 'user' }}",
        "{{ m['text'] }}",
        "{{ m['content'] | upper }}",
        "{{ m['content'][:3] }}",
    ],
)
def test_a_template_that_does_not_write_the_answer_is_refused(written: str) -> None:
    template = (
        "{%- for m in messages -%}<|{{ m['role'] }}|>" + written + "</s>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )
    with pytest.raises(ValueError, match="leaves out what the assistant says, or writes it in other words"):
        encode_turn(said("a question", "the answer"), {}, encoder(template))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<" not in text
)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(WORDS, min_size=2, max_size=6), plain=st.booleans())
def test_any_chat(turns: list[str], plain: bool) -> None:
    """The labels are the answer and its end, the rest is what the model would be given, token by token."""
    found = encoder(None if plain else TEMPLATE)
    turns = turns[: len(turns) // 2 * 2]
    row = encode_turn(said(*turns), {}, found)
    assert 0 < row.start < len(row.ids) and row.ids[-1] == found.tokenizer.eos_token_id
    answer = found.tokenizer.decode(row.ids[row.start : -1])
    assert answer.strip() == turns[-1].strip() or answer.endswith(turns[-1])
    prompt = found.chat_text(said(*turns)[:-1], asks=True)
    assert found.tokenizer.decode(row.ids[: row.start]) == prompt or plain
    assert found.tokenizer.decode(row.ids) == found.chat_text(said(*turns))
