"""Prompts: ``{column}`` stands for the value of a column, and nothing else is done.

No ``str.format``, which reaches attributes, and no template language: a card from a stranger runs no code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pyra.errors import did_you_mean

SEPARATOR = " "
"""Between a prompt and its answer."""

BETWEEN_EXAMPLES = "\n\n"

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill(prompt: str, row: Mapping[str, str]) -> str:
    """Put the values of a row into a prompt; braces within a value stay as they are.

    >>> fill("Question: {question}", {"question": "what is {x}?"})
    'Question: what is {x}?'
    """
    return _PLACEHOLDER.sub(lambda match: row[match[1]], prompt)


def prompt_problems(prompt: str, columns: Sequence[str], target: str, where: str = "prompt") -> list[str]:
    """List what is wrong with a prompt: placeholders that are no column, none at all, or the answer itself.

    Args:
        prompt: with its placeholders.
        columns: that there are.
        target: the one of the answer.
        where: it stands in the card.
    """
    names = _PLACEHOLDER.findall(prompt)
    problems = [
        f"{where}: {{{name}}} is not one of the columns {', '.join(columns)}{did_you_mean(name, columns)}"
        for name in dict.fromkeys(names)
        if name not in columns
    ]
    if target in names:
        problems.append(f"{where}: {{{target}}} is the answer")
    if not names:
        problems.append(f"{where}: no {{column}} in it")
    if set("{}") & set(_PLACEHOLDER.sub("", prompt)):
        problems.append(f"{where}: a brace that belongs to no {{column}}")
    if prompt != prompt.rstrip():
        problems.append(f"{where}: ends with white space (a space is put before the answer)")
    return problems
