"""One table of texts, written as people and programs read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "…": r"\ldots{}", "↓": r"$\downarrow$",
}  # fmt: skip
_MARKDOWN = re.compile(r"[\\`*|<>\[\]~]|(?<!\w)_|_(?!\w)")


@dataclass(frozen=True)
class Table:
    """Headers and lines of cells; the first ``left`` columns hold names, the others numbers."""

    headers: Sequence[str]
    cells: Sequence[Sequence[str]]
    left: int = 1


def plain(table: Table) -> str:
    """Return aligned columns."""
    return _tabulated(table, "simple", clean)


def markdown(table: Table) -> str:
    """Return a table as GitHub reads it; characters that mean something there are escaped."""
    return _tabulated(table, "pipe", markdown_text)


def latex(table: Table) -> str:
    """Return a ``tabular`` for the package booktabs; characters that mean something to LaTeX are escaped."""
    columns = "l" * table.left + "r" * (len(table.headers) - table.left)
    lines = [rf"{' & '.join(latex_text(cell) for cell in line)} \\" for line in (table.headers, *table.cells)]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
         r"\end{tabular}"]
    )  # fmt: skip


def clean(text: str) -> str:
    """Return the text without line breaks and what else a terminal would act on."""
    return "".join(char if char.isprintable() else "?" for char in text)


def markdown_text(text: str) -> str:
    r"""Return the text as it stands in Markdown.

    >>> print(markdown_text("a|b *c* d_e _f_"))
    a\|b \*c\* d_e \_f\_
    """
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", clean(text))


def latex_text(text: str) -> str:
    r"""Return the text as it stands in LaTeX.

    >>> print(latex_text("50 % of a_b & {c}"))
    50 \% of a\_b \& \{c\}
    """
    return "".join(_LATEX.get(char, char) for char in clean(text))


RENDERERS: dict[str, Callable[[Table], str]] = {"plain": plain, "markdown": markdown, "latex": latex}
"""Every format of a table of texts, by name."""


def _tabulated(table: Table, style: str, escape: Callable[[str], str]) -> str:
    cells = [[escape(cell) for cell in line] for line in table.cells]
    align = ["left"] * table.left + ["right"] * (len(table.headers) - table.left) if cells else None
    headers = [escape(header) for header in table.headers]
    return str(
        tabulate(cells, headers, tablefmt=style, disable_numparse=True, colalign=align, preserve_whitespace=False)
    )
