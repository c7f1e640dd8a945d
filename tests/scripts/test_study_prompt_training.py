"""The study of adapters that are trained on shortened prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_language import decoder, save, tokenizer, write_sums

from pyra.scripts import study_prompt_training

WAYS = "method: lora; method: pyra, keep: '0:0.2'; method: tome, keep: '0:0.2', rule: truncate"


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    backbone, data = save(decoder(spread=0.5), tokenizer(), tmp_path / "model"), write_sums(tmp_path / "data")
    small = ["--train", "8", "--test", "4", "--max-new-tokens", "4", "--rounds", "1", "--device", "cpu", "--ways", WAYS]
    return ["--backbone", str(backbone), "--task", "gsm8k", "--root", str(data), *small]


def test_ways_are_compared_and_kept(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    given += ["--output", str(output)]
    assert study_prompt_training.main(given) == 0
    found = json.loads(output.read_text())
    plain, merged, truncated = found["rows"]
    assert plain["macs_ratio"] == 1 and merged["macs_ratio"] == truncated["macs_ratio"] < 1
    assert len({row["nll"] for row in found["rows"]}) == 3 and all(len(row["nlls"]) == 4 for row in found["rows"])
    assert merged["trained_parameters"] > plain["trained_parameters"] == truncated["trained_parameters"]
    sizes = [found["prefill"][row["name"]]["cache_bytes"] for row in found["rows"]]
    assert sizes[0] > sizes[1] == sizes[2]
    said = capsys.readouterr().out
    assert f"{merged['nll']:.3f}" in said and f"{merged['nll'] - plain['nll']:+.3f}" in said
    assert str(tmp_path) not in output.read_text()
    # what is there is not trained again, more seeds are added
    found["rows"][0]["accuracy"] = 0.5
    output.write_text(json.dumps(found))
    assert study_prompt_training.main([*given, "--seeds", "2"]) == 0
    again = json.loads(output.read_text())["rows"]
    assert again[:3] == found["rows"] and [row["seed"] for row in again[3:]] == [1, 1, 1]
    assert again[3]["nll"] != plain["nll"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--ways", "method: ["], "is no YAML"),
        (["--ways", "method: pyra, rat: 0.5"], "did you mean 'rate'"),
        (["--ways", "method: pyra"], "needs --rate"),
        (["--ways", ";"], "is empty"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_ways_that_are_none(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study_prompt_training.main(["--backbone", "x", *changes])


def test_another_studys_file_is_left_alone(given: list[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    output.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="holds something else"):
        study_prompt_training.main([*given, "--output", str(output)])
