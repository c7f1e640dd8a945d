"""Cards of language tasks, prompts and rules that read answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pyra.errors import DataError
from pyra.tasks.data.cards import load_card, suite_cards
from pyra.tasks.data.task import load_task
from pyra.tasks.language.answers import RULES, cut, plain_number
from pyra.tasks.language.cards import TextCard, find_text_card, is_text_task
from pyra.tasks.language.prompts import fill


def test_the_shipped_cards() -> None:
    cards = suite_cards("language")
    assert [card.name for card in cards] == ["sst2", "copy", "lookup", "gsm8k"]
    assert all(isinstance(card, TextCard) and card.description and card.license and card.hub for card in cards)
    assert is_text_task("sst2") and is_text_task("mine.yaml") and not is_text_task("demo") and not is_text_task(None)
    with pytest.raises(DataError, match="'demo' is about images; the language tasks are copy, gsm8k, lookup, sst2"):
        find_text_card("demo")
    with pytest.raises(DataError, match="did you mean 'sst2'"):
        find_text_card("sst")
    with pytest.raises(DataError, match="gsm8k is about texts, not images"):
        load_task("gsm8k")


def written(place: Path, /, **changes: Any) -> str:
    home = load_card("sst2")[1]
    values = {**yaml.safe_load((home / "sst2.yaml").read_text()), **changes}
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Review: {0}"}, r"prompt: \{0\} is not one of the columns text, label"),
        ({"prompt": "{text.__class__}"}, r"prompt: \{text.__class__\} is not one of the columns"),
        ({"prompt": "{text} {label}"}, r"prompt: \{label\} is the answer"),
        ({"prompt": "{{text}}"}, "a brace that belongs to no"),
        ({"prompt": "Good?"}, r"no \{column\} in it"),
        ({"prompt": "{text}:\n"}, "ends with white space"),
        ({"prompt": "{txt}"}, "did you mean 'text'"),
        ({"extract": "lastnumber"}, "did you mean 'last_number'"),
        ({"answer": "head"}, "answer 'head' is not one of scoring, generation"),
        ({"target": "lable"}, "target 'lable' is not one of the columns"),
        ({"folder": "../secrets"}, "'../secrets' leads out of the root"),
        ({"files": {"train": "/etc/passwd.tsv", "test": "a.tsv"}}, "leads out of the root"),
        ({"files": {"train": "a.txt", "test": "a.tsv"}}, r"'a.txt' should end with one of .tsv"),
        ({"files": {"train": "a.tsv", "tets": "a.tsv"}}, "did you mean 'test'"),
        ({"files": {"train": 3, "test": "a.tsv"}}, "files should map names to text"),
        ({"files": None, "hub": None}, "give files, hub, or both"),
        ({"labels": [False, True]}, "labels = "),
        ({"labels": ["good", "good"]}, "each another"),
        ({"labels": ["good"], "classes": 1}, "two names at least"),
        ({"label_words": ["good"]}, "one for each label"),
        ({"labels": ["good", " "]}, "may not be empty"),
        ({"classes": 3}, "classes is 3, labels has 2"),
        ({"metric": "f1"}, "metric 'f1' is not one of accuracy, exact_match"),
        ({"metric": "exact_match"}, "accuracy is for tasks with labels"),
        ({"labels": None, "classes": 0, "metric": "exact_match"}, "answer scoring needs labels"),
        ({"pair": "text", "text": None}, "pair needs text"),
        ({"max_length": -1}, "max_length is -1; it should be at least 0"),
        ({"compose": {"items": 2, "item": "{number} {text}"}}, "compose is for tasks without labels"),
        ({"colums": ["text"]}, "unknown key 'colums'"),
        ({"kind": "parquet"}, "must hold 'kind: text'"),
    ],
)
def test_what_is_wrong_with_a_card_is_told_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        find_text_card(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_several_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metric 'f1'.*|extract 'x'.*") as error:
        find_text_card(written(tmp_path, metric="f1", extract="x", answer="y"))
    assert all(part in str(error.value) for part in ("metric 'f1'", "extract 'x'", "answer 'y'"))


@pytest.mark.parametrize("text", ["", "[1, 2]", "kind: text\n  : :", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_card(text: str, tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"card\.yaml"):
        find_text_card(str(path))
    with pytest.raises(DataError, match="No such file"):
        find_text_card(str(tmp_path / "none.yaml"))


def test_a_prompt_is_filled_once_and_reaches_no_attribute() -> None:
    assert fill("Q: {a} {b}", {"a": "{b} {0} {a.__class__}", "b": "\\1"}) == "Q: {b} {0} {a.__class__} \\1"


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("whole", "  a b \n", "a b"),
        ("whole", " \n", None),
        ("words", " a\n b  c ", "a b c"),
        ("words", " \n", None),
        ("first_line", "\n  positive\nReview: x", "positive"),
        ("last_number", "He has 5-3=2 left, 10 in all.", "10"),
        ("last_number", "between 10-15", "15"),
        ("last_number", "it is -4", "-4"),
        ("last_number", "costs $1,234.50.", "1234.5"),
        ("last_number", "none", None),
        ("last_number", ".5 of it", "0.5"),
        ("final_number", "18 * 2 = 36\n#### 36", "36"),
        ("final_number", "#### 18\n\nQuestion: 5 apples\n#### 5", "18"),
        ("final_number", "#### $1,000", "1000"),
        ("final_number", "so 12 #### none", "12"),
        ("final_number", "the answer is 7 apples", "7"),
        ("final_number", "3 <<3=3>>3 ####", "3"),
    ],
)
def test_rules(rule: str, text: str, answer: str | None) -> None:
    assert RULES[rule](text) == answer


@pytest.mark.parametrize(
    ("text", "plain"),
    [("18.00", "18"), ("1,000,000", "1000000"), ("-0.50", "-0.5"), ("00", "0"), ("100", "100"), ("−3", "-3")],
)
def test_numbers_are_written_plainly(text: str, plain: str) -> None:
    assert plain_number(text) == plain


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut("7\nQuestion: b\n\nend", ["\n\n", "\nQuestion:"]) == "7"
    assert cut("7", []) == "7"
