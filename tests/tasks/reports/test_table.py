"""Numbers, alignment and escapes of the tables."""

from __future__ import annotations

import re

import pytest

from pyra.tasks.reports import results_table
from pyra.tasks.reports.summary import csv_cell


def test_plain_table_holds_the_numbers_in_aligned_columns(rows):
    lines = results_table(rows).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "method", "rate", "top-1 (%)", "trained parameters", "MACs (M)", "images/s", "speed-up"
    ]  # fmt: skip
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert cells[3] == ["LoRA + PYRA", "0.71", "60.4", "66,102", "103", "2,421", "2.98x"]
    assert cells[0] == ["linear probe", "0.00", "45.2", "1,930", "356", "812", "1.00x"]
    assert len({line.rstrip().rindex("x") for line in lines[2:]}) == 1


def test_markdown_table_with_baseline_and_missing_numbers(rows, make):
    rows.append(make("a|b", 0.7, None, 17_580_000_000, seed=4))
    lines = results_table(rows, "markdown", baseline="LoRA").splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    head = cells[0]
    assert head[:5] == ["method", "seed", "rate", "top-1 (%)", "difference"]
    assert re.fullmatch(r"\|:-+\|(-+:\|)+", lines[1])
    tome = dict(zip(head, cells[4], strict=True))
    assert (tome["difference"], tome["speed-up"], tome["MACs (G)"]) == ("-10.2", "3.10x", "0.10")
    last = dict(zip(head, cells[6], strict=True))
    assert (last["method"], last["images/s"], last["speed-up"], last["MACs (G)"]) == ("a\\|b", "-", "-", "17.6")


def test_table_of_several_tasks_and_metrics(make):
    table = results_table([make(), make(task="sst2", metric="f1", value=0.5)])
    assert "task" in table.splitlines()[0]
    assert "top-1 (%) 50.0" in table
    assert "f1 0.500" in table
    assert results_table([]).splitlines()[0].startswith("method")


def test_the_likelihood_of_right_answers_has_a_column_where_a_row_knows_it(make):
    header, _, first, second = results_table([make(answer_nll=0.2704), make("lora")]).splitlines()
    assert "answer NLL" in header and " 0.27 " in first and " 0.27 " not in second
    assert "answer NLL" not in results_table([make()])


def test_rows_chosen_on_the_test_split_say_so(make):
    lines = results_table([make(protocol="fixed"), make("lora", protocol="published")]).splitlines()
    assert lines[0].split()[1] == "protocol" and "published (chosen on the test split)" in lines[3]
    assert "protocol" not in results_table([make(protocol="fixed")])


def test_table_refusals(rows):
    with pytest.raises(ValueError, match="'html', 'markdown', 'plain'"):
        results_table(rows, "latex")
    with pytest.raises(ValueError, match=r"no row of method 'full'.*LoRA"):
        results_table(rows, baseline="full")


def test_no_cell_of_a_csv_file_is_a_formula() -> None:
    assert csv_cell("=1+1") == "'=1+1" and csv_cell(" @x") == "' @x" and csv_cell("-x\x1b[2J") == "'-x?[2J"
    assert csv_cell(-0.5) == -0.5 and csv_cell("pyra") == "pyra" and csv_cell(["=1"]) == '["=1"]'
