"""The benchmark of whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyra.backbones import macs, wrap
from pyra.errors import ConfigError, ScheduleError
from pyra.scripts import benchmark
from pyra.tasks.benchmarks.subject import Subject


def test_a_subject_is_described_without_its_weights() -> None:
    subject = Subject("vit_tiny_patch16_224", 64, dtype="bfloat16", backend="reference", attention="augmented")
    sizes, schedules = subject.shapes()
    assert (sizes.tokens, subject.side()) == (17, 64)
    model = wrap(subject.make(), subject.merging("high"))
    assert model.pyra_config.backend == "reference" and model.pyra_config.attention == "augmented"
    assert next(model.parameters()).dtype == torch.bfloat16
    assert macs(model, schedules["high"]) == macs(model) < macs(model, schedules["low"])


@pytest.mark.slow  # compiles and trains a model
def test_rows_of_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = "--backbone vit_tiny_patch16_224 --image-size 64 --batch-size 2 --train-batch-size 2 --rounds 2"
    assert benchmark.main(["model", *arguments.split(), "--train-rounds", "1", "--output", str(output)]) == 0
    assert "plain" in capsys.readouterr().out
    rows = {row["measured"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "forward, low",
        "forward, high",
        "merging machinery, high",
        "training step, high",
        "peak memory of training, high",
        "memory of a training step, high",
    ]
    assert rows["forward, low"]["goal"] < rows["forward, high"]["goal"]
    for row in rows.values():
        (ratio,) = row["ratios"].values()
        assert ratio > 0 and row["image_size"] == 64
    assert rows["merging machinery, high"]["goal"] is None  # promised on a GPU only


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["engines"], "measures model, kernels, adapters, experts, decoder, input, exports, serve, not 'engines'"),
        (["kernels", "--rounds", "0"], "--rounds must be at least 1"),
        (["kernels", "--batch-sizes", "0,4"], "--batch-sizes must be at least 1"),
        (["model", "--device", "gpu"], "--device must be cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (["--attention", "flash"], "'flash' is not one of auto, mask, fused, augmented, flex"),
        (["--dtype", "float64"], "'float64' is not one of float32, bfloat16, float16"),
        (["--output", "."], "--output . is a folder; give a file"),
        (["kernels", "--output", "."], "--output . is a folder; give a file"),
    ],
)
def test_wrong_options(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        benchmark.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--device cuda: 0 CUDA devices are here; use cpu"):
        benchmark.main(["kernels", "--device", "cuda"])


def test_an_image_in_which_nothing_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ScheduleError, match="nothing merges in vit_tiny_patch16_224 at 16 px: give a larger --image-size"
    ):
        benchmark.main(
            ["--backbone", "vit_tiny_patch16_224", "--image-size", "16", "--output", str(tmp_path / "x.json")]
        )
    assert not list(tmp_path.iterdir())
