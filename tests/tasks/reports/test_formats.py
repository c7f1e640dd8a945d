"""Characters that mean something in Markdown, LaTeX or a terminal."""

from __future__ import annotations

import re

from pyra.tasks.reports.formats import Table, latex, markdown, plain

ODD = Table(["method", "top-1 (%)"], [["a|b_c & {50%}\n\x1b[31m", "61.2 ± 0.3"], ["_x_ *y* `z` <b>\\^~$#", "-"]])


def test_plain_has_no_line_breaks_and_no_terminal_codes() -> None:
    lines = plain(ODD).splitlines()
    assert len(lines) == 4 and "\x1b" not in plain(ODD)
    assert len({len(line) for line in lines[1:]}) == 1


def test_markdown_keeps_its_columns() -> None:
    lines = markdown(ODD).splitlines()
    assert [len(re.split(r"(?<!\\)\|", line)) for line in lines] == [4] * 4
    assert r"a\|b_c & {50%}??\[31m" in lines[2]
    assert r"\_x\_ \*y\* \`z\` \<b\>\\^\~$#" in lines[3]
    assert re.fullmatch(r"\|:-+\|-+:\|", lines[1])


def test_latex_is_a_booktabs_table() -> None:
    lines = latex(ODD).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[-1] == r"\end{tabular}"
    assert [lines[i] for i in (1, 3, -2)] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert lines[4] == r"a|b\_c \& \{50\%\}??[31m & 61.2 $\pm$ 0.3 \\"
    assert r"\textless{}b\textgreater{}\textbackslash{}\textasciicircum{}\textasciitilde{}\$\#" in lines[5]


def test_no_rows() -> None:
    empty = Table(["method", "value"], [])
    assert "method" in plain(empty) and "method" in markdown(empty) and r"\bottomrule" in latex(empty)
