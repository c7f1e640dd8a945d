"""Thoughts before an answer: the marks around them, and what is said behind them."""

from __future__ import annotations

import pytest
from tiny_language import decoder, tokenizer

from pyra.tasks.language.scoring import generate
from pyra.tasks.language.thoughts import Marks, opened, spoken, thought_marks
from pyra.tasks.language.tokens import Encoder

MARKS = Marks("<think>", "</think>")
_TURN = "{{ '<s>[' + m.role + ']' }}"
# An empty thought stands where there is none; the thought of the last answer alone is kept.
_EMPTY = (
    "{% for m in messages %}" + _TURN + "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + "
    "'\n</think>\n\n' }}{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The prompt opens the thought.
_OPENED = (
    "{% for m in messages %}" + _TURN + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
_PLAIN = "{% for m in messages %}" + _TURN + "{{ m.content }}\n{% endfor %}[a] "
_RAISES = "{% for m in messages %}{{ raise_exception('no system') }}{% endfor %}"
_BEHIND = "{% for m in messages %}" + _TURN + "{{ m.content }}<because>{{ m.reasoning_content }}</because>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "marks"),
    [(_EMPTY, MARKS), (_OPENED, MARKS), (_PLAIN, None), (_RAISES, None), (_BEHIND, None), (None, None)],
    ids=["empty", "opened", "plain", "raises", "behind", "none"],
)
def test_marks_are_read_off_the_template(template: str | None, marks: Marks | None) -> None:
    words = tokenizer()
    words.chat_template = template
    assert thought_marks(words) == marks


def test_what_is_spoken() -> None:
    assert spoken(" <think>a</think>\nb</think>", MARKS) == "\nb</think>"
    assert spoken("<think>a", MARKS) == "" and spoken("a<think>b</think>", MARKS) == "a<think>b</think>"
    assert spoken("<think>a</think>b", None) == "<think>a</think>b"
    assert opened("[a]<think>\n", MARKS) == "<think>" and opened("<think>\n</think>", MARKS) == opened("x", None) == ""


@pytest.mark.parametrize("told", [False, True], ids=["said", "in the prompt"])
def test_an_answer_ends_behind_its_thought(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, model = Encoder(tokenizer(), chat=True), decoder()
    encoder.tokenizer.chat_template = _PLAIN
    prompts = [encoder.prompt("a fine film")]
    (free,) = generate(model, prompts, encoder, max_new_tokens=30, batch_size=1)
    text = encoder.tokenizer.decode(encoder.tokenizer(free.text, add_special_tokens=False)["input_ids"])
    assert text == free.text and len(text) > 20
    # What the model says anyway is taken for marks: a stop within the thought, and one behind it.
    start, within, end, rest = text[:3], text[4:6], text[11:14], text[14:]
    stop = next(rest[i : i + 2] for i in range(2, len(rest) - 1) if rest[i : i + 2] not in text[: 14 + i])
    marks = Marks("[a]" if told else start, end)
    monkeypatch.setattr("pyra.tasks.language.tokens.thought_marks", lambda _: marks)
    thinking = Encoder(encoder.tokenizer, chat=True)
    (said,) = generate(model, prompts, thinking, stop=[stop, within], max_new_tokens=30, batch_size=1)
    first = min(place for place in (rest.find(stop), rest.find(within)) if place >= 0)
    assert said.text == rest[:first].lstrip() and 0 < said.tokens < free.tokens
    (cut,) = generate(model, prompts, thinking, max_new_tokens=5, batch_size=1)
    assert cut == ("", 5), "a thought that does not end is no answer"
