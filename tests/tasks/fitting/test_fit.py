"""What the training options do to weights, groups and logs, on a tiny backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyra.errors import ConfigError
from pyra.tasks.fitting import checkpoints
from pyra.tasks.fitting import fit as fitting
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.fitting.clock import Clock
from pyra.tasks.fitting.trainer import ImageTrainer
from pyra.tasks.options import RunOptions
from pyra.tasks.training import train


def options(backbone: Path, folder: Path, **changes: Any) -> RunOptions:
    values: dict[str, Any] = {
        "method": "tome", "rate": 0.5, "epochs": 2, "batch_size": 8, "limit": 40, "dropout": 0.0, "drop_path": 0.0,
        "lr": 1e-2, **changes,
    }  # fmt: skip
    return RunOptions(backbone=str(backbone), output=str(folder), device="cpu", **values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def test_a_step_in_parts_is_the_same_step(tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "whole", limit=39))  # 4 steps of 8 an epoch; 19 parts of 2 hold no more
    train(options(tiny_backbone, tmp_path / "parts", limit=39, accumulate=4))
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    first, second = (json.loads((tmp_path / run / "training.json").read_text()) for run in ("whole", "parts"))
    assert [e["loss"] for e in second["losses"]] == pytest.approx([e["loss"] for e in first["losses"]], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_backbone: Path, tmp_path: Path) -> None:
    elastic = {"method": "pyra", "rate": "0.2:0.5", "elastic": True}
    train(options(tiny_backbone, tmp_path / "plain", **elastic))
    train(options(tiny_backbone, tmp_path / "again", **elastic, gradient_checkpointing=True))
    expected = weights(tmp_path / "plain")
    for name, tensor in weights(tmp_path / "again").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_the_average_is_what_is_saved(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watched(name: str) -> None:
        plain = getattr(ProgressBar, name)

        def after(self: ProgressBar, *arguments: Any, model: Any = None, **more: Any) -> None:
            plain(self, *arguments, **more)
            seen.append(checkpoints.trained_tensors(model))

        monkeypatch.setattr(ProgressBar, name, after)

    watched("on_train_begin")
    watched("on_step_end")
    train(options(tiny_backbone, tmp_path / "run", ema=0.3, epochs=1))
    average = {name: tensor.double() for name, tensor in seen[0].items()}
    for step, tensors in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * tensor.double() for name, tensor in tensors.items()}
    assert len(seen) == 6
    differing = 0
    for name, tensor in weights(tmp_path / "run").items():
        (key,) = [key for key in average if key.replace(".default", "").replace(".modules_to_save", "") == name]
        torch.testing.assert_close(tensor.double(), average[key], rtol=1e-5, atol=1e-7)
        differing += not torch.allclose(tensor, seen[-1][key], rtol=1e-4, atol=1e-6)
    assert differing > 3


def test_learning_rates_of_layers_and_groups(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, float] = {}

    def looked(self: ImageTrainer, *_: Any, **__: Any) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in self.create_optimizer().param_groups:
            found.update({names[id(p)]: group["lr"] for p in group["params"]})
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageTrainer, "train", looked)
    with pytest.raises(KeyboardInterrupt):
        train(options(tiny_backbone, tmp_path / "run", method="pyra", lr=1e-2, head_lr=0.5, reactivation_lr=1e-4,
                      layer_decay=0.5))  # fmt: skip

    def rate(*parts: str) -> set[float]:
        return {round(lr, 10) for name, lr in found.items() if all(part in name for part in parts)}

    assert rate("head") == {0.5}
    assert rate("blocks.2", "lora") == {5e-3} and rate("blocks.1", "lora") == {2.5e-3}
    assert rate("blocks.0", "lora") == {1.25e-3}
    assert rate("reactivation") == {1e-4}


def test_tensorboard_gets_the_losses(tiny_backbone: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra 'tracking' is not installed"
    )
    train(options(tiny_backbone, tmp_path / "run", track=("tensorboard",)))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    losses = json.loads((tmp_path / "run" / "training.json").read_text())["losses"]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [
        (entry["step"], entry["loss"]) for entry in losses
    ]
    again = train(options(tiny_backbone, tmp_path / "run", track=("tensorboard",), overwrite=True))
    assert again.value >= 0


def test_a_tracker_that_is_not_installed(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--track trackio: not installed; pip install trackio"):
        train(options(tiny_backbone, tmp_path / "run", track=("trackio",)))
    assert not (tmp_path / "run").exists()


def test_a_clock_counts_the_sitting_before() -> None:
    before, after = Clock(), Clock()
    kept = before.tensors()
    kept["seconds"] += 100
    after.restore(kept)
    assert 100 < after.seconds() < 110


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ema": 1.0}, "--ema must be between 0 and 1"),
        ({"layer_decay": 0.0}, "--layer-decay must be above 0 and at most 1"),
        ({"smoothing": 1.0}, "--smoothing must be in"),
        ({"mixup": -1.0}, "--mixup must be at least 0"),
        ({"accumulate": 0}, "--accumulate must be above 0"),
        ({"accumulate": 3}, "--batch-size 8 cannot be shared by 1 process times 3 parts"),
        ({"method": "linear", "rate": None, "ema": 0.9}, "--ema goes with every method but linear"),
        ({"method": "linear", "rate": None, "mixup": 1.0}, "--mixup: a linear probe"),
        ({"track": ("tensorbord",)}, "--track must be one of .*did you mean 'tensorboard'"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], said: str, tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(options(tiny_backbone, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_a_line_says_how_it_goes(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyra.tasks.fitting.callbacks.BETWEEN_LINES", 0.0)
    train(options(tiny_backbone, tmp_path / "run"))
    error = capsys.readouterr().err
    assert "\r" not in error and "it/s" not in error
    lines = [line.partition(", loss")[0] for line in error.splitlines() if "training: step" in line]
    assert lines[0] == "tome: training: step 1 of 10, epoch 0.2"
    assert lines[-1] == "tome: training: step 10 of 10, epoch 2.0"
    assert len(set(lines)) == len(lines)
