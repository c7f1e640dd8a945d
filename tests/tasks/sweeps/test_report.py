"""The report of a folder of runs, as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_runs import write_runs
from PIL import Image

from pyra.errors import DataError
from pyra.files import write_json
from pyra.tasks.sweeps.report import write_report

Write = Callable[..., Path]


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_three_files_with_points_front_and_failures(sweep: Path) -> None:
    page = write_report(sweep)
    assert page == sweep / "report.html"
    assert sorted(file.name for file in sweep.iterdir()) == [
        "failures",
        "front.png",
        "report.html",
        "report.md",
        "runs",
    ]
    data, html = data_of(page), page.read_text(encoding="utf-8")
    assert len(data["points"]) == 5 and data["methods"] == ["linear", "lora", "pyra", "tome"]
    assert [cost["key"] for cost in data["costs"]] == ["speedup", "speed", "macs", "parameters", "memory"]
    best = data["points"][0]
    assert best[1] == 1 and best[3] == pytest.approx(320.5 / 400) and best[4] == pytest.approx(0.5**0.5 / 400)
    assert best[5] == str(sweep / "runs" / "lora-0")
    assert "10 finished runs in 5 points" in html and "1 failed run" in html
    assert "80.1 ± 0.2" in html and "&lt;b&gt;too much" in html and "<b>too" not in html and "rate=0.9" in html
    front = [line for line in html.splitlines() if "<td>●</td>" in line]
    assert [re.findall(r"<td[^>]*>([^<]*)", line)[0::2][0] for line in front] == ["lora", "pyra", "pyra"]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html) and "http://www.w3.org/2000/svg" in html
    with Image.open(sweep / "front.png") as image:
        assert image.size == (1920, 1200)
    text = (sweep / "report.md").read_text(encoding="utf-8")
    assert "| lora " in text and r"\<b\>too much" in text and "![The front](front.png)" in text
    assert f"pyra evaluate {sweep}/runs/lora-0" in text and "most frequent class of demo scores 25.0" in text


def test_a_second_call_adds_runs_and_drops_failures_that_were_mended(sweep: Path, write: Write) -> None:
    write_report(sweep)
    write("pyra-9", "pyra", 200, 0.9)
    html = write_report(sweep).read_text(encoding="utf-8")
    assert "11 finished runs in 6 points" in html and "failed" not in html.split("<script")[0]


@pytest.mark.filterwarnings("error")
def test_rates_of_an_elastic_run_are_points(write: Write, tmp_path: Path) -> None:
    write("elastic", "pyra", 300, 0.7)
    for rate in (0.3, 0.7):
        write("elastic", "pyra", 310, rate, asked=rate)
    page = write_report(tmp_path / "sweep")
    data = data_of(page)
    assert "1 finished run in 2 points" in page.read_text(encoding="utf-8")
    assert sorted(point[2] for point in data["points"]) == [0.3, 0.7]
    for point in data["points"]:
        evaluate, export, use = (text for _, _, text in data["commands"][point[6]])
        assert evaluate.endswith(f"--rate {point[2]:g}") and f"--rate {point[2]:g} --format" in export
        assert f"run_at_rate(RUN_FOLDER, {point[2]:g})" in use


def test_odd_names_stay_text(write: Write, tmp_path: Path) -> None:
    write("a", "</script><img src=x>$title", 300)
    write("b", "衣類", 200, 0.1)
    write("b c'd", "x|y", 310, 0.5, speed=None, environment={})
    page = write_report(tmp_path / "sweep")
    html = page.read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and "<img src=x" not in html
    assert data_of(page)["methods"] == ["</script><img src=x>$title", "x|y", "衣類"]
    assert "'\"'\"'" in (tmp_path / "sweep" / "report.md").read_text(encoding="utf-8")


def test_several_tasks_and_texts(write: Write, tmp_path: Path) -> None:
    write("a", "lora", 300)
    write("b", "lora", 310, task="other", unit="examples", metric="exact_match")
    write("c", "lora", 310, seed=1, environment={"device": "a GPU"})
    page = write_report(tmp_path / "sweep")
    data, html = data_of(page), page.read_text(encoding="utf-8")
    assert data["contexts"] == [["demo", "test", "accuracy"], ["other", "test", "exact_match"]]
    assert [len(kind) for kind in data["commands"]] == [3, 1]
    assert '<select id="task">' in html and "different devices (a CPU, a GPU)" in html
    assert "1 points have no speed" in html


def test_failures_alone_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(DataError, match=r"no finished run below .*pyra train"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "failures" / "a.json", {"run": "a", "error": "out of memory"})
    (tmp_path / "failures" / "b.json").write_text("{", encoding="utf-8")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "out of memory" in html and "b.json cannot be read" in html and "<svg" not in html


def test_pictures_that_lie_there_are_shown(sweep: Path) -> None:
    (sweep / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(sweep / "pictures" / "pyra-0.50.png")
    html = write_report(sweep).read_text(encoding="utf-8")
    assert "Merged tokens" in html and "<figcaption>pyra-0.50</figcaption>" in html
    write_report(sweep, pictures=True)  # these runs have no model: none is made, none is lost
    assert [file.name for file in (sweep / "pictures").iterdir()] == ["pyra-0.50.png"]


def test_many_runs_are_quick(tmp_path: Path) -> None:
    write_runs(tmp_path, 900)
    start = time.process_time()
    page = write_report(tmp_path)
    assert (
        time.process_time() - start < 8
    )  # takes 1; ten thousand (tests/support/many_runs.py) are to take less than 10
    assert len(data_of(page)["points"]) == 300


def test_without_torch(sweep: Path) -> None:
    code = (
        f"import sys; from pyra.tasks.sweeps.report import write_report; write_report({str(sweep)!r}); "
        "print(sorted({'torch', 'transformers', 'datasets', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == "[]"
