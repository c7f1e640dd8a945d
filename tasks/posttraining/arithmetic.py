"""Arithmetic with answers that can be verified: sums, differences and products, drawn by a seed."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from pyra.errors import ConfigError

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Problem:
    """What is asked, and the right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How hard the problems are.

    Attributes:
        digits: of each number, at most.
        terms: numbers in a problem; they are taken from left to right, products before sums.
        operators: of :data:`OPERATORS`.
        negative: whether a number may be negative.
        seed: of the draw.
    """

    digits: int = 2
    terms: int = 2
    operators: str = "+-"
    negative: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check it; raises :class:`ConfigError` with all problems."""
        problems = []
        if not 1 <= self.digits <= 9:
            problems.append(f"digits must be 1 to 9, got {self.digits}")
        if not 2 <= self.terms <= 9:
            problems.append(f"terms must be 2 to 9, got {self.terms}")
        unknown = sorted(set(self.operators) - OPERATORS.keys())
        if unknown or not self.operators:
            problems.append(f"operators must be of {' '.join(OPERATORS)}, such as +-, got {self.operators!r}")
        if problems:
            raise ConfigError(f"arithmetic: {'; '.join(problems)}")


def arithmetic_problems(how: Arithmetic, train: int, test: int) -> tuple[list[Problem], list[Problem]]:
    """Draw problems for training and for the test; none is in both, and none is drawn twice.

    The test's problems are drawn first: they are the same however many are trained on.

    Raises:
        ConfigError: where there are not so many different ones.

    >>> train, test = arithmetic_problems(Arithmetic(digits=1), 20, 2)
    >>> [problem.prompt + " " + problem.answer for problem in test]
    ['6 + 6 = 12', '4 - 8 = -4']
    """
    generator = random.Random(how.seed)
    seen: dict[str, Problem] = {}
    tries = 0
    while len(seen) < train + test:
        problem = _drawn(how, generator)
        tries = 0 if problem.prompt not in seen else tries + 1
        if tries > 1000:
            raise ConfigError(
                f"arithmetic: {train} training and {test} test problems were asked for and about {len(seen)} different "
                "ones exist: ask for fewer, or for more digits"
            )
        seen[problem.prompt] = problem
    drawn = list(seen.values())
    return drawn[test:], drawn[:test]


def _drawn(how: Arithmetic, generator: random.Random) -> Problem:
    most = 10**how.digits - 1
    numbers = [generator.randint(-most if how.negative else 0, most) for _ in range(how.terms)]
    signs = [generator.choice(how.operators) for _ in range(how.terms - 1)]
    written = [str(number) if number >= 0 or not place else f"({number})" for place, number in enumerate(numbers)]
    text = written[0] + "".join(f" {sign} {number}" for sign, number in zip(signs, written[1:], strict=True))
    return Problem(f"{text} =", str(value_of(numbers, signs)))


def value_of(numbers: list[int], signs: list[str]) -> int:
    """Return the value of numbers with operators between them, products first.

    >>> value_of([2, 3, 4], ["+", "*"])
    14
    """
    sums, left = [numbers[0]], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            sums[-1] *= number
        else:
            left.append(sign)
            sums.append(number)
    total = sums[0]
    for sign, number in zip(left, sums[1:], strict=True):
        total = OPERATORS[sign](total, number)
    return total
