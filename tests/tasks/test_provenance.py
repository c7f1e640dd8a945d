"""What a run was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pyra.errors import DataError
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.options import RunOptions
from pyra.tasks.provenance import adapter_settings, data_source, majority, settings, weights_digest
from pyra.tasks.results import read_result
from pyra.tasks.runs import new_model
from pyra.tasks.training import train


def digest(model: nn.Module, **changes: object) -> str:
    return weights_digest(model, **changes)  # type: ignore[arg-type]


def test_a_digest_holds_every_name_kind_shape_and_value() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    first = digest(model)
    assert first == digest(model) and len(first) == 64
    seen = {first}
    model[0].weight.data[3, 3] += 1e-3
    seen.add(digest(model))
    model[1].running_mean[0] = 0.5  # type: ignore[index, union-attr]
    seen.add(digest(model))
    model.double()
    seen.add(digest(model))
    model[0].weight.data = model[0].weight.data.reshape(2, 8)
    seen.add(digest(model))
    seen.add(digest(nn.Sequential(nn.Identity(), *model)))
    assert len(seen) == 6
    assert digest(model, leave_out=[model[1]]) == digest(nn.Sequential(model[0]))


def test_a_transposed_weight_counts_as_it_is_read() -> None:
    model = nn.Linear(3, 3, bias=False)
    first = digest(model)
    model.weight.data = model.weight.data.T.contiguous().T
    assert digest(model) == first
    model.to(torch.bfloat16)
    assert digest(model) != first


def test_majority() -> None:
    assert majority([2, 0, 0, 2, 1], [0, 0, 2, 1]) == 0.5  # 0 and 2 tie: the first
    assert majority([], [0]) is None and majority([0], []) is None


def test_backbone_weights_are_known_whatever_the_head_the_seed_and_the_adapter(tiny_backbone: Path) -> None:
    found = []
    for seed, method, classes in ((0, "linear", 10), (1, "pissa", 7), (2, "full", 10)):
        torch.manual_seed(seed)
        model = new_model(RunOptions(backbone=str(tiny_backbone), method=method), classes)
        found.append(model.backbone_sha256)
    assert len(set(found)) == 1
    drawn = new_model(RunOptions(backbone="vit_tiny_patch16_224", method="linear", pretrained=False), 10)
    assert drawn.backbone_sha256 == "random"


def test_settings_and_adapter_are_json() -> None:
    options = RunOptions(rate=0.5, peft="dora", targets="qkv,proj", seed=3, output="here")
    told = settings(options)
    assert told["lr"] == 1e-3 and not {"seed", "output", "device", "epochs"} & set(told)
    adapter = adapter_settings(options)
    assert adapter is not None
    assert adapter["peft"]["peft_type"] == "LORA"
    assert adapter["peft"]["target_modules"] == ["proj", "qkv"] and adapter["peft"]["use_dora"] is True
    assert "bias" not in adapter["peft"]  # a default
    assert adapter["pyra"]["rate"] == 0.5
    json.dumps([told, adapter], allow_nan=False)
    assert adapter_settings(RunOptions(method="full")) is None


@pytest.mark.parametrize("method", ["adalora", "bottleneck", "prompts", "ia3", "oft", "fourierft", "vera"])
def test_every_kind_of_adapter_is_json(method: str) -> None:
    adapter = adapter_settings(RunOptions(method=method))
    assert adapter is not None and adapter["pyra"] is None
    assert json.loads(json.dumps(adapter, allow_nan=False)) == adapter


def test_data_source(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert data_source(RunOptions(task="demo", method="linear")) == "shipped"
    assert data_source(RunOptions(task="dsprites_ori", method="linear")) == "drawn"
    assert data_source(RunOptions(task="cifar100", root=str(tmp_path), method="linear")) == f"{tmp_path.name}/cifar100"
    assert data_source(RunOptions(data=str(tmp_path / "photos"), method="linear")) == "photos"
    assert data_source(RunOptions(data="someone/pictures", method="linear")) == "someone/pictures"
    with pytest.raises(DataError, match="unknown task"):
        data_source(RunOptions(task="demmo", method="linear"))


def test_a_run_says_what_it_was_made_from(tiny_backbone: Path, tmp_path: Path) -> None:
    options = RunOptions(
        backbone=str(tiny_backbone),
        rate=0.4,
        epochs=1,
        limit=40,
        batch_size=8,
        device="cpu",
        output=str(tmp_path / "a"),
    )
    row = train(options)
    assert read_result(tmp_path / "a") == row
    assert row.protocol == "fixed" and row.selection and row.chosen is None
    assert row.task_version == "1" and row.preprocessing == "squash" and row.data_source == "shipped"
    assert row.test_sha256 and row.train_sha256 and row.test_sha256 != row.train_sha256 and row.weights_sha256
    assert row.majority_value is not None and 0 < row.majority_value < 0.5
    assert row.wall_seconds is not None and row.train_seconds is not None and row.wall_seconds > row.train_seconds
    assert row.peak_memory_bytes is not None and row.peak_memory_bytes > 50_000_000
    assert row.unit == "images" and row.split == "test" and row.higher_is_better
    again = evaluate_run(tmp_path / "a", device="cpu")
    assert (again.protocol, again.majority_value, again.test_sha256) == ("fixed", row.majority_value, row.test_sha256)
    other = evaluate_run(tmp_path / "a", device="cpu", split="validation")
    assert other.split == "validation" and other.test_sha256 != row.test_sha256
    assert other.train_sha256 == row.train_sha256
