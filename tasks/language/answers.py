"""Rules that read an answer out of a text, by name: a card names one, it never holds code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

# A minus after a digit or a bracket subtracts, or stands between two ends: "10-15".
_NUMBER = re.compile(r"(?:(?<![\d.)])[-−])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


def whole(text: str) -> str | None:
    """Return the text without white space around it."""
    return text.strip() or None


def words(text: str) -> str | None:
    """Return the words, whatever white space is between them."""
    return " ".join(text.split()) or None


def first_line(text: str) -> str | None:
    """Return the first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def last_number(text: str) -> str | None:
    """Return the last number, written plainly.

    >>> last_number("He pays $1,250.50 for 3 of them, so 3751.50.")
    '3751.5'
    """
    numbers = _NUMBER.findall(text)
    return plain_number(numbers[-1]) if numbers else None


def final_number(text: str) -> str | None:
    """Return the number after the first ``####``, as GSM8K writes it, or else the last one of the text.

    >>> final_number("5 * 4 = 20 #### 20, and 7 more")
    '20'
    """
    before, mark, after = text.partition(_MARK)
    if mark:
        line = after.split("\n", 1)[0]
        found = _NUMBER.search(line)
        if found:
            return plain_number(found[0])
    return last_number(before if mark else text)


RULES: dict[str, Callable[[str], str | None]] = {
    "whole": whole,
    "words": words,
    "first_line": first_line,
    "last_number": last_number,
    "final_number": final_number,
}
"""Every rule by name; None means that the text holds no answer."""


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the texts that end an answer."""
    ends = [text.find(mark) for mark in stop]
    return text[: min([end for end in ends if end >= 0], default=len(text))]


def plain_number(text: str) -> str:
    """Write a number without currency, thousands and trailing zeros.

    >>> plain_number("$1,200.00"), plain_number("-0"), plain_number("007")
    ('1200', '0', '7')
    """
    value = Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    plain = f"{value:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    plain = plain.lstrip("-").lstrip("0").removesuffix(".") or "0"
    plain = f"0{plain}" if plain.startswith(".") else plain
    return f"-{plain}" if value < 0 and plain != "0" else plain
