"""The faults of the published code, put back one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyra.backbones.layers import merging_layers
from pyra.errors import ConfigError
from pyra.scripts import study_corrections
from pyra.scripts.study_corrections import PAIRS, VARIANTS, CorrectionOptions
from pyra.tasks.data.task import load_task
from pyra.tasks.evaluation import data_for


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    variant = VARIANTS[name]
    return variant.build(CorrectionOptions().run(name, 0, variant.changes), 10)


def logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, 96, 96, generator=generator))


def test_lora_starts_as_the_backbone_or_not() -> None:
    def moved(name: str) -> float:
        model = built(name)
        with_adapter = logits(model)
        with model.disable_adapter():
            return float((logits(model) - with_adapter).abs().max())

    assert moved("pyra") == 0
    assert moved("random-lora") > 0.01


def test_one_of_two_heads_does_not_train() -> None:
    for name, trains in (("two-heads", True), ("one-of-two-heads", False)):
        model = built(name).train()
        model(torch.rand(2, 3, 96, 96)).square().mean().backward()
        head = model.get_base_model().head_dist.modules_to_save["default"]
        assert (head.weight.grad is not None) is trains
        assert model.get_base_model().head.modules_to_save["default"].weight.grad is not None
    torch.testing.assert_close(logits(built("two-heads")), logits(built("one-of-two-heads")))


def test_prompts_merge_or_stay() -> None:
    prefixes = [{layer.step.prefix for layer in merging_layers(built(n))} for n in ("prompts", "merging-prompts")]
    assert prefixes == [{9}, {1}]
    assert not torch.equal(logits(built("prompts")), logits(built("merging-prompts")))


def test_jpeg_changes_pixels_a_little() -> None:
    data = data_for(built("pyra"), load_task("demo"), "test", limit=4)
    saved = study_corrections.as_jpeg(data)
    difference = (data.pixels.int() - saved.pixels.int()).abs().float().mean()
    assert 0 < difference < 10 and data.pixels.shape == saved.pixels.shape


@pytest.mark.slow  # a training each fault
def test_the_study_of_tiny_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = f"--seeds 1 --epochs 0.1 --limit 40 --runs {tmp_path / 'runs'} --output {output}"
    assert study_corrections.main(arguments.split()) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["correction"] for row in rows] == list(PAIRS) and "lossy" in capsys.readouterr().out
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        study_corrections.main(["--seeds", "0"])
