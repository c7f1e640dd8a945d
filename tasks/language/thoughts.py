"""What a model says after it has thought: the marks around a thought are read off the tokenizer's chat template."""

from __future__ import annotations

from typing import Any, NamedTuple

_THOUGHT, _SAID = "1f0c8f3a", "9b27d6e4"  # texts that no template holds


class Marks(NamedTuple):
    """The texts that open and close a thought."""

    start: str
    end: str


def thought_marks(tokenizer: Any) -> Marks | None:
    """Return the marks that a chat template writes around the thought of an answer; None where it writes none.

    An answer is rendered with and without a thought (``reasoning_content``, as transformers and serving engines name
    it): what is new before the thought opens it, what stands between it and the answer closes it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        with_thought, without = (_rendered(tokenizer, more) for more in ({"reasoning_content": _THOUGHT}, {}))
    except Exception:  # a template may raise whatever its author wrote
        return None
    if _SAID not in without or with_thought.find(_THOUGHT) > with_thought.find(_SAID) or _THOUGHT not in with_thought:
        return None
    before, rest = with_thought.split(_THOUGHT, 1)
    end = rest.split(_SAID, 1)[0].strip()
    pairs = enumerate(zip(before, without, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), len(before))
    start = before[_whole_mark(before, shared) :].strip()
    if not start and before.rstrip().endswith(pair := end.replace("/", "", 1)):
        start = pair  # an answer without a thought has an empty one: the mark stands in both
    return Marks(start, end) if start and end else None


def _whole_mark(text: str, place: int) -> int:
    """Return where the mark begins that a place lies in, or the place: ``<think>`` and ``</think>`` share their "<"."""
    for left, right in ("<>", "[]"):
        begun = text.rfind(left, 0, place)
        if begun >= 0 and not any(one == right or one.isspace() for one in text[begun:place]):
            return begun
    return place


def opened(prompt: str, marks: Marks | None) -> str:
    """Return what a prompt has begun already: the mark that opens a thought, or nothing."""
    return marks.start if marks is not None and prompt.rstrip().endswith(marks.start) else ""


def spoken(text: str, marks: Marks | None) -> str:
    """Return what stands behind the thought at the beginning of a text; nothing while that goes on.

    >>> spoken("<think>2 + 2</think> 4", Marks("<think>", "</think>")), spoken("4", Marks("<think>", "</think>"))
    (' 4', '4')
    """
    if marks is None or not text.lstrip().startswith(marks.start):
        return text
    return text.partition(marks.end)[2]


def _rendered(tokenizer: Any, more: dict[str, str]) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SAID, **more}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
