"""Rewards: right answers, forms and lengths; mistakes of reward functions; arithmetic."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from pyra.errors import ConfigError
from pyra.tasks.posttraining import rewards
from pyra.tasks.posttraining.arithmetic import Arithmetic, Problem, arithmetic_problems, value_of
from pyra.tasks.posttraining.rewards import Guarded, answer_reward, form_reward, length_reward, same_answers

SAME = [
    ("19", "19", True),
    (" 19\n", "19", True),
    ("-3", "-3", True),
    ("3", "-3", False),
    ("1,250.00", "1250", True),
    ("1,2", "12", False),
    ("12 + 7 = 19", "19", True),
    ("first 18, so the answer is 19", "19", True),
    ("19, or rather 20", "19", False),
    ("5 * 4 = 20\n#### 20\nQuestion: 7", "20", True),
    ("1/2", "0.5", True),
    ("so it is $\\frac{1}{2}$", "1/2", True),
    ("$x^2 + 2x + 1$", "$(x+1)^2$", True),
    ("nothing", "4", False),
    ("", "4", False),
    ("{{{", "4", False),
]


@pytest.mark.parametrize(("text", "answer", "right"), SAME)
def test_right_answers_are_told_from_wrong_ones(text: str, answer: str, right: bool) -> None:
    assert same_answers([text], [answer]) == [right]


def test_chats_are_read_as_texts_are() -> None:
    completions = [[{"role": "assistant", "content": "it is 19"}], [{"role": "assistant", "content": None}]]
    assert answer_reward(completions=completions, answer=["19", "19"], prompts=[1, 2]) == [1.0, 0.0]


def test_what_takes_too_long_is_wrong_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "SECONDS", 1)
    assert same_answers(["9**9**9**9", "7"], ["3", "7"]) == [False, True]


def test_another_thread_gets_the_same_answers() -> None:
    found: list[Any] = []

    def compare() -> None:
        found.append(same_answers([text for text, *_ in SAME], [answer for _, answer, _ in SAME]))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert found == [[right for *_, right in SAME]]


def test_forms_and_lengths() -> None:
    assert form_reward()(completions=[" 19", "-4 ", "19 apples", ""]) == [1.0, 1.0, 0.0, 0.0]
    assert form_reward("a+")(completions=["aa", "ab"]) == [1.0, 0.0]
    assert length_reward(4)(completion_ids=[[0] * count for count in (0, 4, 5, 6, 8, 80)]) == [
        0, 0, -0.25, -0.5, -1, -1,
    ]  # fmt: skip


# mistakes of reward functions


def call(reward: Any, texts: list[str], **columns: Any) -> tuple[Any, list[str], list[tuple[str, float]]]:
    told: list[str] = []
    logged: list[tuple[str, float]] = []
    guarded = Guarded(reward, "mine", told.append)
    log = lambda name, value: logged.append((name, value))  # noqa: E731
    found = guarded(prompts=["p"] * len(texts), completions=texts, log_metric=log, **columns)
    assert guarded.samples == len(texts) and guarded.failed == sum(one is None for one in found)
    return found, told, logged


def test_a_reward_that_raises_marks_the_samples_it_raises_on() -> None:
    def reward(completions: list[str], answer: list[str], step: int, **_: Any) -> list[float]:
        assert step == 7
        return [float(int(text) == int(right)) for text, right in zip(completions, answer, strict=True)]

    found, told, logged = call(reward, ["1", "x", "2", "y"], answer=["1", "1", "1", "1"], step=7)
    assert found == [1.0, None, 0.0, None]
    assert len(told) == 1 and "'mine' raised ValueError: invalid literal" in told[0] and "\n" not in told[0]
    assert logged == [("rewards/mine/failed", 0.5)]


@pytest.mark.parametrize(
    ("values", "expected", "said"),
    [
        ([0.5, float("nan")], [0.5, None], "returned nan"),
        ([float("inf"), 1], [None, 1.0], "returned inf"),
        (["0.5", "good"], [0.5, None], "returned 'good', which is no number"),
    ],
)
def test_rewards_that_are_no_numbers_are_told_once(values: list[Any], expected: list[Any], said: str) -> None:
    found, told, _ = call(lambda **_: values, ["a", "b"])
    assert found == expected and len(told) == 1 and said in told[0]


class Strange:
    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class StrangeError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def leaves(**_: Any) -> list[float]:
    sys.exit(3)


def raises_strangely(**_: Any) -> list[float]:
    raise StrangeError


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda **_: [10**400, 10**400], "which is no number"),
        (lambda **_: [1e39, -1e39], "returned 1e+39"),
        (lambda **_: [Strange(), Strange()], "returned an object of Strange, which is no number"),
        (leaves, "raised SystemExit: 3"),
        (raises_strangely, "raised StrangeError: an object of StrangeError"),
    ],
)
def test_whatever_a_reward_does_its_samples_are_marked(reward: Any, said: str) -> None:
    found, told, _ = call(reward, ["a", "b"])
    assert found == [None, None] and len(told) == 1 and said in told[0]


def test_none_is_no_mistake() -> None:
    guarded = Guarded(lambda **_: [None, 1.0], "mine", pytest.fail)
    assert guarded(prompts=[0, 1], completions=["a", "b"]) == [None, 1.0]
    assert guarded.failed == 0


def test_too_few_rewards_mark_all_samples() -> None:
    found, told, logged = call(lambda **_: [], ["a", "b"])
    assert found == [None, None] and "it returned 0 rewards for 1 samples" in told[0] and logged[0][1] == 1.0


def test_the_message_comes_once_and_the_count_goes_on() -> None:
    told: list[str] = []
    guarded = Guarded(lambda **_: [float("nan")], "mine", told.append)
    for _ in range(3):
        guarded(prompts=["p"], completions=["c"])
    assert len(told) == 1 and guarded.failed == guarded.samples == 3


# arithmetic


@pytest.mark.parametrize("terms", [2, 3, 4])
@pytest.mark.parametrize("operators", ["+", "-", "+-", "+-*"])
@pytest.mark.parametrize("negative", [False, True])
def test_answers_are_what_python_says(terms: int, operators: str, negative: bool) -> None:
    train, test = arithmetic_problems(Arithmetic(digits=2, terms=terms, operators=operators, negative=negative), 50, 20)
    for problem in [*train, *test]:
        assert eval(problem.prompt.removesuffix("=")) == int(problem.answer)


def test_training_and_test_share_nothing_and_come_from_the_seed() -> None:
    train, test = arithmetic_problems(Arithmetic(), 500, 100)
    assert len(train) == 500 and len(test) == 100
    assert len({problem.prompt for problem in [*train, *test]}) == 600
    assert arithmetic_problems(Arithmetic(), 500, 100) == (train, test)
    assert arithmetic_problems(Arithmetic(), 20, 100) == (train[:20], test)
    assert arithmetic_problems(Arithmetic(seed=1), 500, 100)[1] != test
    assert all(isinstance(problem, Problem) for problem in train)


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="about 200 different ones exist"):
        arithmetic_problems(Arithmetic(digits=1), 300, 10)


def test_difficulty_is_checked_together() -> None:
    with pytest.raises(ConfigError, match=r"digits must be 1 to 9, got 0; terms must be 2 to 9, got 1; operators must"):
        Arithmetic(digits=0, terms=1, operators="/")


def test_products_come_first() -> None:
    assert value_of([1, 2, 3, 4], ["-", "*", "+"]) == -1
