"""The comparison of elastic adapters with those of one rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyra.backbones import set_rate
from pyra.backbones.layers import merging_layers
from pyra.errors import ConfigError
from pyra.scripts import study_elastic
from pyra.scripts.study_elastic import resampled_model
from pyra.tasks.options import RunOptions


@pytest.mark.slow  # a training each rate
def test_the_study_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = "--seeds 1 --epochs 0.02 --limit 40 --kinds elastic,resampled --rates 0.2,0.4"
    arguments += f" --runs {tmp_path / 'runs'} --output {output}"
    assert study_elastic.main(arguments.split()) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["kind"], row["rate"]) for row in rows] == [
        ("elastic", 0.2),
        ("elastic", 0.4),
        ("resampled", 0.2),
        ("resampled", 0.4),
    ]
    assert "difference" in capsys.readouterr().out
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


@pytest.mark.parametrize("arguments", [["--rates", "0.3"], ["--rates", "0.3,half"], ["--seeds", "0"]])
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        study_elastic.main(arguments)


def test_stretched_weights_have_as_many_rows_as_there_are_pairs() -> None:
    model = resampled_model(RunOptions(rate="0.2:0.6", elastic=True, pretrained=False), 10)
    for rate in (0.2, 0.6):
        set_rate(model, rate)
        for layer in merging_layers(model):
            if layer.step.removed:
                rows = layer.reactivation.pair_weight
                whole = layer.reactivation.modules_to_save["default"].parametrizations.pair_weight.original
                assert len(rows) == layer.step.removed <= len(whole)
                torch.testing.assert_close(rows[[0, -1]], whole[[0, -1]])
