"""``pyra results``."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyra.files import write_json
from pyra.scripts.main import main
from pyra.tasks.results import RunResult

LABELS = [0, 1] * 50


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods with three seeds, one chosen on the test split."""
    for seed in range(3):
        write(tmp_path / f"runs/linear-{seed}", "linear", 50 + seed, seed)
        write(tmp_path / f"runs/a|b_{seed}", "a|b_c%", 60 + 2 * seed, seed, rate=0.7)
    write(tmp_path / "runs/published", "lora", 70, 0, protocol="published")
    return tmp_path / "runs"


def write(folder: Path, method: str, right: int, seed: int, **changes: Any) -> None:
    known: dict[str, Any] = {
        "task": "demo", "metric": "accuracy", "macs": 2_000_000, "schedule": [0], "rate": 0.0, "seed": seed,
        "trained_parameters": 1930, "backbone": "demo", "protocol": "fixed", "majority_value": 0.5,
        "test_sha256": "a" * 64, "settings": {"lr": 0.1}, "images_per_second": 100.0, "throughput_batch_size": 16,
        "environment": {"device": "a CPU"},
    }  # fmt: skip
    write_json(folder / "result.json", RunResult(**{**known, "method": method, "value": right / 100, **changes}))
    answers = [label if i < right else 1 - label for i, label in enumerate(LABELS)]
    told = {"labels": LABELS, "predictions": answers, "split": "test", "sha256": "a" * 64}
    write_json(folder / "predictions.json", told)


def test_one_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_bytes(b"\0")
    assert main(["results", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["majority class", "a|b_c%", "linear", "lora"]
    assert [next(name for name in names if name in line) for line in lines[2:6]] == [
        "majority class", "linear", "a|b_c%", "lora"
    ]  # fmt: skip
    assert "images/s (batch 16)" in lines[0] and "MACs (M)" in lines[0]
    assert "51.0 ± 1.0" in lines[3] and "0,1,2" in lines[3] and "1,930" in lines[3]
    assert "published (chosen on the test split)" in lines[5]
    assert "measured on a CPU" in lines
    assert lines[-1].startswith("1 file is no result") and "not JSON" in lines[-1]


def test_sort_where_and_several_folders(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / name) for name in ("linear-0", "linear-1", "published")]
    assert main(["results", folders[0], "--sort", "value", *folders[1:], "--where", "method=linear,seed=1,seed=0"]) == 0
    out = capsys.readouterr().out
    assert "50.5 ± 0.7" in out and "lora" not in out
    assert main(["results", str(runs), "--sort", "value"]) == 0
    out = capsys.readouterr().out
    assert out.index("lora") < out.index("a|b_c%") < out.index("linear ") < out.index("majority")


def test_csv_has_full_precision_and_every_row(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(runs), "--format", "csv", "--compare", "linear"]) == 0
    caught = capsys.readouterr()
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(caught.out))}
    assert list(rows) == ["majority class", "linear", "a|b_c%", "lora"]
    assert float(rows["a|b_c%"]["value_std"]) == pytest.approx(0.02, rel=1e-15)
    assert json.loads(rows["a|b_c%"]["values"]) == [0.6, 0.62, 0.64]
    assert json.loads(rows["linear"]["settings"]) == {"lr": 0.1} and rows["linear"]["trained_parameters"] == "1930"
    assert rows["lora"]["protocol"] == "published (chosen on the test split)"
    assert float(rows["a|b_c%"]["difference"]) == pytest.approx(0.11) and rows["linear"]["difference"] == ""
    assert "same seeds, same images" in caught.err


@pytest.mark.parametrize("style", ["plain", "markdown", "latex", "json", "csv"])
@pytest.mark.parametrize("more", [[], ["--pivot", "task,method"], ["--pivot", "seed,method"], ["--compare", "linear"]])
def test_every_format_of_every_table(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str, more: list[str]
) -> None:
    file = tmp_path / "out" / "table"
    assert main(["results", str(runs), "--format", style, "--output", str(file), *more]) == 0
    assert str(file) in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "chosen on the test split" in text and "majority class" in text
    assert {"markdown": r"a\|b_c%", "latex": r"a|b\_c\%"}.get(style, "a|b_c%") in text
    if style == "json":
        made = json.loads(text)
        assert {"rows", "notes"} == set(made) and len(made["rows"]) >= 4
    if style == "latex":
        assert all(line.startswith(("%", "\\")) or line.endswith("\\\\") or not line for line in text.splitlines())


def test_a_pivot_with_the_comparison_below(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(runs), "--pivot", "seed,method", "--compare", "lora"]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out and "-20.0" in out


def test_evaluations_join_where_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((runs / "linear-0" / "result.json").read_text()) | {"split": "validation", "value": 0.9}
    write_json(runs / "linear-0" / "evaluation-validation.json", row)
    main(["results", str(runs)])
    assert "validation" not in capsys.readouterr().out
    main(["results", str(runs), "--evaluations"])
    assert "validation" in capsys.readouterr().out


def test_the_page_of_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(runs), "--page"]) == 0
    assert capsys.readouterr().out == f"written to {runs / 'report.html'}\n"
    text = (runs / "report.html").read_text(encoding="utf-8")
    assert "7 finished runs in 3 points" in text and "published (chosen on the test split)" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{}/empty"], ["no result below", "pyra train --output runs/a"]),
        (["{}/none"], ["no such folder"]),
        (["{}", "--pivot", "task,methd"], ["--pivot", "did you mean 'method'"]),
        (["{}", "--format", "html"], ["html", "markdown"]),
        (["{}", "--sort", "vlue"], ["did you mean 'value'"]),
        (["{}", "--compare", "lorra"], ["no run of that method (did you mean 'lora'?)"]),
        (["{}", "--where", "metod=lora"], ["NAME=VALUE", "did you mean 'method'"]),
        (["{}", "--where", "method=linaer"], ["no such run (did you mean 'linear'?)"]),
        (["{}", "--where", "rate=high"], ["a rate is a number"]),
        (["{}", "--formt", "csv"], ["unknown flag '--formt' (did you mean '--format'"]),
        (["{}", "--output", "{}"], ["{} is a folder"]),
        (["{}", "{}", "--page"], ["--page takes one folder, got 2"]),
        (["{}", "--page", "--sort", "value"], ["--sort does not go with --page"]),
        (["{}", "--pictures"], ["--pictures goes with --page"]),
        (["{}/empty", "--page"], ["no finished run below"]),
    ],
)
def test_wrong_input_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    (runs / "empty").mkdir()
    assert main(["results", *(part.format(runs) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part.format(runs) in error for part in parts), error


def test_only_broken_files_are_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text("{}")
    assert main(["results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'task' is missing" in error and "pyra train" in error and error.count("\n") == 1


@pytest.mark.parametrize("style", ["plain", "markdown", "latex", "json", "csv"])
@pytest.mark.parametrize("more", [[], ["--pivot", "method,task"], ["--pivot", "rate,seed"], ["--compare", "odd"]])
def test_odd_rows_break_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str, more: list[str]
) -> None:
    odd: list[dict[str, Any]] = [
        {"value": 1e300, "macs": 10**300, "images_per_second": 1e308, "metric": "loss", "higher_is_better": False},
        {"value": -1e308, "metric": "loss", "higher_is_better": False, "seed": 1, "macs": -5},
        {"method": "", "task": "", "backbone": None, "rate": -3.0, "environment": {}},
        {"method": "日本語|&_%\n\x1b[2J#$~^\\{}", "environment": {"device": {"a": 1}, "date": 3}},
        {"chosen": {"lr": [1]}, "settings": {"lr": {}}, "adapter": {"a": {"b": [1, {"c": 2}]}}, "seed": 7},
        {"protocol": "published", "environment": {"device": ["x"], "date": "nonsense"}, "unit": "tokens"},
    ]
    for number, row in enumerate(odd):
        write(tmp_path / str(number), row.pop("method", "odd"), 50, row.pop("seed", 0))
        file = tmp_path / str(number) / "result.json"
        write_json(file, json.loads(file.read_text()) | row | ({"method": "other"} if number == 4 else {}))
    assert main(["results", str(tmp_path), "--format", style, *more]) == 0
    out = capsys.readouterr().out
    assert "日本語" in out
    if style in ("plain", "markdown", "latex"):
        assert "\x1b" not in out and "1.000e+300" in out
    if style == "json":
        json.loads(out)


def test_answers_without_torch(runs: Path) -> None:
    code = (
        "import sys; from pyra.scripts.main import main; "
        f"main(['results', {str(runs)!r}, '--pivot', 'task,method', '--compare', 'linear']); "
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
