"""The study of ways to merge prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_language import decoder, save, tokenizer, write_sums

from pyra.scripts import study_prompts


def test_settings_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, data = save(decoder(spread=0.5), tokenizer(), tmp_path / "model"), write_sums(tmp_path / "data")
    given = ["--backbone", str(backbone), "--task", "gsm8k", "--root", str(data), "--limit", "5", "--device", "cpu"]
    output = tmp_path / "rows.json"
    settings = "keep: {0: 1.0}; keep: {0: 0.1}; keep: {0: 0.1}, rule: drop"
    assert study_prompts.main([*given, "--settings", settings, "--output", str(output)]) == 0
    said, found = capsys.readouterr().out, json.loads(output.read_text())
    plain, nothing, merged, dropped = found["rows"]
    assert plain["change"] == nothing["change"] == 0 and plain["macs_ratio"] == 1 and "keep: {0: 0.1}" in said
    assert merged["nll"] != plain["nll"] and merged["nll"] != dropped["nll"] and merged["macs_ratio"] < 1
    assert str(tmp_path) not in output.read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [("rate: [", "is no YAML"), ("rat: 0.5", "did you mean 'rate'"), ("rate: 2", r"rate must be a number in \[0, 1\)")],
)
def test_settings_that_are_none(settings: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study_prompts.main(["--backbone", "x", "--settings", settings])
