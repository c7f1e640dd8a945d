"""The benchmark of LoRA on experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError
from pyra.scripts import benchmark
from pyra.tasks.benchmarks import experts

SMALL = "experts --hidden 64 --intermediate 32 --experts 8 --active 2 --tokens 16 --rank 4 --rounds 2"


def test_rows_of_experts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = []

    def here(job: Any, *arguments: Any) -> int:
        ran.append(arguments[1])
        assert job(*arguments) >= 0
        return 1000 * (1 + len(ran))

    monkeypatch.setattr(experts, "in_fresh_process", here)
    assert benchmark.main([*SMALL.split(), "--output", str(tmp_path / "rows.json")]) == 0
    said = capsys.readouterr().out
    assert "/ peft share" in said and "8 experts of 64 x 32, 2 a token  " in said
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert ran == ["pyra", "pyra, an eighth of the experts", "peft"]
    assert [(row["measured"], row["implementation"], row["goal"]) for row in rows] == [
        ("training step", "pyra", 3.0),
        ("training step", "pyra, an eighth of the experts", None),
        ("peak memory", "pyra", 0.4),
        ("peak memory", "pyra, an eighth of the experts", None),
    ]
    assert rows[2]["ratios"] == {"peft share": 0.5} and rows[2]["reached"] is False
    assert rows[0]["reached"] is (rows[0]["ratios"]["peft"] >= 3.0)


def test_nothing_is_timed_where_the_two_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = experts.copy_factors

    def wrongly(ours: Any, theirs: Any) -> None:
        copied(ours, theirs)
        next(p for name, p in ours.named_parameters() if name.endswith("down_B")).data.mul_(2)

    monkeypatch.setattr(experts, "copy_factors", wrongly)
    with pytest.raises(ConfigError, match="do not agree"):
        benchmark.main([*SMALL.split(), "--output", str(tmp_path / "rows.json")])
    with pytest.raises(ConfigError, match="multiples of 8"):
        benchmark.main([*SMALL.replace("64", "60").split(), "--output", str(tmp_path / "rows.json")])
    assert not list(tmp_path.iterdir())
