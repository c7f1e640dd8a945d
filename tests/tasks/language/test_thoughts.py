"""Thoughts before an answer: the marks around them, and what is said behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_language import decoder, save, tokenizer

from pyra.errors import ConfigError
from pyra.scripts.main import main
from pyra.tasks.language.evaluation import Evaluation, evaluate_backbone
from pyra.tasks.language.scoring import generate
from pyra.tasks.language.thoughts import Marks, opened, spoken, thought_marks
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.reports.collect import Found
from pyra.tasks.reports.front import tokens_notes
from pyra.tasks.reports.groups import group
from pyra.tasks.results import RunResult, read_result

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
# An answer without a thought begins with the mark that closes one.
_CLOSED = (
    "{% for m in messages %}" + _TURN + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}{{ '<think>' + "
    "m.reasoning_content }}{% endif %}{{ '</think>' }}{% endif %}{{ m.content }}{% endfor %}"
)
_PLAIN = "{% for m in messages %}" + _TURN + "{{ m.content }}\n{% endfor %}[a] "
_RAISES = "{% for m in messages %}{{ raise_exception('no system') }}{% endfor %}"
_BEHIND = "{% for m in messages %}" + _TURN + "{{ m.content }}<because>{{ m.reasoning_content }}</because>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (_EMPTY, MARKS),
        (_OPENED, MARKS),
        (_CLOSED, MARKS),
        (_PLAIN, None),
        (_RAISES, None),
        (_BEHIND, None),
        (None, None),
    ],
    ids=["empty", "opened", "closed", "plain", "raises", "behind", "none"],
)
def test_marks_are_read_off_the_template(template: str | None, marks: Marks | None) -> None:
    words = tokenizer()
    words.chat_template = template
    assert thought_marks(words) == marks


def test_what_is_spoken() -> None:
    assert spoken(" <think>a</think>\nb</think>", MARKS) == "\nb</think>"
    assert spoken("<think>a", MARKS) == "" and spoken("a<think>b</think>", MARKS) == "a<think>b</think>"
    assert spoken("<think>a</think>b", None) == "<think>a</think>b"
    assert opened("[a]</think>", MARKS) == ""
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


_SWITCHED = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    words = tokenizer()
    words.chat_template = _SWITCHED
    return save(decoder(), words, tmp_path / "chatty")


def test_the_templates_switch_is_told(
    chatty: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "--backbone", str(chatty), "--task", "gsm8k", "--root", str(root), "--max-new-tokens", "6"]
    given += ["--device", "cpu", "--chat"]
    rows = {}
    for name in ("on", "off", "auto"):
        assert main([*given, "--thinking", name, "--output", str(tmp_path / "runs" / name)]) == 0
        rows[name] = read_result(tmp_path / "runs" / name)
        assert rows[name].settings is not None and rows[name].settings["thinking"] == name
    assert rows["on"].answer_nll == rows["auto"].answer_nll != rows["off"].answer_nll
    assert all(0 < (row.answer_tokens or 0) <= 6 for row in rows.values())
    assert "tokens an answer" in capsys.readouterr().out
    assert main([*given[:-1], "--thinking", "on"]) == 2
    assert "--thinking on goes with --chat" in capsys.readouterr().err


def test_a_template_without_a_switch_is_told_apart(root: Path, tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = _PLAIN
    plain = save(decoder(), words, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"--thinking on: the chat template of .* heeds neither enable_thinking"):
        evaluate_backbone(str(plain), "gsm8k", Evaluation(chat=True, thinking="on"), root=str(root))


def test_the_front_of_tokens_names_what_nothing_beats() -> None:
    def row(value: float, tokens: float, thinking: str) -> RunResult:
        return RunResult(
            task="gsm8k", method="none", metric="accuracy", value=value, macs=1, schedule=[0], rate=0.0,
            trained_parameters=0, seed=0, answer_tokens=tokens, settings={"thinking": thinking},
        )  # fmt: skip

    rows = [row(0.5, 10, "off"), row(0.6, 90, "on"), row(0.4, 40, "auto")]
    found = [Found(Path(str(place)), one) for place, one in enumerate(rows)]
    (note,) = tokens_notes(group(found)[0])
    assert "thinking=off), 50.0 with 10.0 tokens; none (thinking=on), 60.0 with 90.0 tokens" in note
    assert "auto" not in note and tokens_notes(group(found[:1])[0]) == []
