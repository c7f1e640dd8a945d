"""Rewards that can be verified: a right answer, a form, a length. What a reward function does never ends a run.

A reward function is called with keywords (``prompts``, ``completions``, ``completion_ids`` and the columns of the data,
one entry a sample) and returns a number a sample, or None for a sample it has nothing to say about.

``python -m pyra.tasks.posttraining.rewards`` compares answers that come as JSON on its input: see :func:`same_answers`.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pyra.tasks.language.answers import plain_number

Rewards = list[float | None]
SECONDS = 2
"""Time that reading one answer, and comparing it, may take."""

_MARK = "####"
_NUMBER = re.compile(r"[-−]?\$?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
_TAIL = 2000  # letters at the end of a completion that are read: an answer comes last
_ENDS = (Exception, SystemExit)  # what a function may raise, without anybody having asked for the run to end
_LARGEST = 3.4e38  # of float32, in which rewards are added up
_START = 60  # seconds that another process may take to begin


def answer_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> Rewards:
    """Return 1 where a completion ends with the right answer and 0 elsewhere: numbers as numbers, else by math-verify.

    What follows the last ``####``, as GSM8K writes it, is the answer where there is one.
    """
    found = same_answers([text_of(completion) for completion in completions], answer)
    return [float(right) for right in found]


def form_reward(pattern: str = r"\s*-?\d+\s*") -> Callable[..., Rewards]:
    """Return a reward of 1 for a completion that is of a form from its first letter to its last, and 0 for others.

    Args:
        pattern: regular expression of the whole completion; a whole number by default.
    """
    compiled = re.compile(pattern)

    def form(completions: Sequence[Any], **_: Any) -> Rewards:
        return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]

    return form


def length_reward(tokens: int) -> Callable[..., Rewards]:
    """Return a reward of 0 up to a number of tokens, which falls to -1 at twice that number."""

    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [-min(max(len(ids) - tokens, 0) / tokens, 1.0) for ids in completion_ids]

    return length


class Guarded:
    """A reward function whose mistakes are marked, counted and said once, and never end a run.

    Where a call raises, samples are given to the function one by one, so that only those it fails on are marked. A
    sample is also marked where its reward is no number, NaN, or beyond float32. Marked samples have no reward of this
    function: they count neither for the mean of their group nor, without another reward, for the update.

    Args:
        reward: the function.
        name: in logs.
        tell: called with the one message about the first mistake.

    Attributes:
        samples: that were scored so far.
        failed: of them marked.
    """

    def __init__(
        self, reward: Callable[..., Any], name: str | None = None, tell: Callable[[str], object] = warnings.warn
    ) -> None:
        self.reward, self.tell = reward, tell
        self.__name__ = name or getattr(reward, "__name__", type(reward).__name__)
        self.samples = self.failed = 0

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
        """Return a reward a sample; None for marked ones."""
        log = columns.pop("log_metric", None)
        given = {"prompts": prompts, "completions": completions, **columns}
        try:
            found = self._called(given, len(completions))
        except _ENDS:
            found = [self._alone(given, place) for place in range(len(completions))]
        values = [self._checked(value) for value in found]
        failed = sum(isinstance(value, _Failed) for value in values)
        self.samples, self.failed = self.samples + len(values), self.failed + failed
        if log is not None:
            log(f"rewards/{self.__name__}/failed", failed / max(len(values), 1))
        return [None if isinstance(value, _Failed) else value for value in values]

    def _called(self, given: dict[str, Any], samples: int) -> list[Any]:
        found = list(self.reward(**given))
        if len(found) != samples:
            raise ValueError(f"it returned {len(found)} rewards for {samples} samples")
        return found

    def _alone(self, given: dict[str, Any], place: int) -> Any:
        samples = len(given["completions"])
        one = {
            name: [values[place]] if isinstance(values, (list, tuple)) and len(values) == samples else values
            for name, values in given.items()
        }
        try:
            return self._called(one, 1)[0]
        except _ENDS as error:
            return self._mark(f"raised {type(error).__name__}: {_shown(error, str)}")

    def _checked(self, value: Any) -> float | _Failed | None:
        if value is None or isinstance(value, _Failed):
            return value
        try:
            number = float(value)
        except _ENDS:
            return self._mark(f"returned {_shown(value, repr)}, which is no number")
        return number if abs(number) <= _LARGEST else self._mark(f"returned {number}")  # False for NaN

    def _mark(self, what: str) -> _Failed:
        if self.tell is not None and not self.failed and not getattr(self, "_told", False):
            self._told = True
            self.tell(
                f"the reward function {self.__name__!r} {what}; such samples have no reward of it, and are counted "
                f"under rewards/{self.__name__}/failed"
            )
        return _Failed()


def _shown(value: object, how: Callable[[Any], str]) -> str:
    """Return a value in one line, whatever its own methods do."""
    try:
        return " ".join(how(value).split())[:200]
    except _ENDS:
        return f"an object of {type(value).__name__}"


class _Failed:
    """In place of a reward that there is not."""


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a list of messages where prompts are chats."""
    return completion if isinstance(completion, str) else "".join(str(one.get("content") or "") for one in completion)


def same_answers(texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Tell for each text whether the answer it ends with is the right one.

    math-verify ends what takes too long by a signal, which Python gives to main threads alone: in another thread the
    answers that are no plain numbers go to a process of their own.
    """
    if len(texts) != len(answers):
        raise ValueError(f"{len(texts)} texts and {len(answers)} answers")
    pairs = [(_ending(text), _ending(str(answer))) for text, answer in zip(texts, answers, strict=True)]
    found = [_same_numbers(*pair) for pair in pairs]
    left = [pair for pair, known in zip(pairs, found, strict=True) if known is None]
    if left:
        here = threading.current_thread() is threading.main_thread()
        compared = iter([_verified(*pair) for pair in left] if here else _verified_elsewhere(left))
        found = [next(compared) if known is None else known for known in found]
    return [bool(one) for one in found]


def _ending(text: str) -> str:
    _, mark, after = text.rpartition(_MARK)
    return (after.split("\n", 1)[0] if mark else text)[-_TAIL:].strip()


def _same_numbers(text: str, answer: str) -> bool | None:
    """Compare two plain numbers; None where one is more than that."""
    if _NUMBER.fullmatch(text) is None or _NUMBER.fullmatch(answer) is None:
        return None
    return plain_number(text) == plain_number(answer)


def _verified(text: str, answer: str) -> bool:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot read, with a traceback
    read = [math_verify.parse(one, parsing_timeout=SECONDS) for one in (answer, text)]
    return all(read) and bool(math_verify.verify(*read, timeout_seconds=SECONDS))


def _verified_elsewhere(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        check=True,
        timeout=_START + 4 * SECONDS * len(pairs),
    )
    return [bool(one) for one in json.loads(done.stdout)]


if __name__ == "__main__":
    json.dump([_verified(*pair) for pair in json.load(sys.stdin)], sys.stdout)
