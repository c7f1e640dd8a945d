"""An interrupted run goes on to the same bits, whatever interrupted it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from pyra.errors import DataError, OutputError
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.fitting import checkpoints
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.fitting.trainer import ImageTrainer
from pyra.tasks.options import RunOptions
from pyra.tasks.reports.report import report
from pyra.tasks.training import train

EPOCHS, STEPS = 3, 15
ROUNDED = pytest.mark.skipif(find_spec("torchao") is None, reason="the extra `torchao` is not installed")


class Interruption(BaseException):
    """Stands for whatever ends a process from outside."""


def options(backbone: Path, folder: Path, **changes: Any) -> RunOptions:
    values: dict[str, Any] = {"method": "pyra", "rate": 0.5, "epochs": EPOCHS, "save_steps": 4, **changes}
    return RunOptions(
        backbone=str(backbone), output=str(folder), batch_size=8, limit=40, device="cpu", drop_path=0.1, **values
    )


def weights(folder: Path) -> dict[str, bytes]:
    """What a run ends with, and its losses on the way."""
    (file,) = (folder / "adapter").glob("*.safetensors")
    losses = json.dumps(json.loads((folder / "training.json").read_text())["losses"]).encode()
    return {"losses": losses} | {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a training end right after a step, before that step's checkpoint."""
    plain = ProgressBar.on_step_end

    def on_step_end(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        plain(self, args, state, control, **more)
        if state.global_step == step:
            raise Interruption

    monkeypatch.setattr(ProgressBar, "on_step_end", on_step_end)


@pytest.fixture(scope="module")
def whole(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, bytes]]]:
    """What uninterrupted runs end with, by the changes of their options."""
    found: dict[str, dict[str, bytes]] = {}

    class Runs(dict[str, dict[str, bytes]]):
        def __missing__(self, key: str) -> dict[str, bytes]:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train(options(tiny_backbone, folder, **json.loads(key)))
            self[key] = weights(folder)
            return self[key]

    yield Runs(found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "full", "rate": None, "layer_decay": 0.8},
        {"method": "linear", "rate": None},
        {"peft": "adalora"},
        {"peft": "pissa"},
        {"ema": 0.9, "randaugment": "rand-m9-n2", "mixup": 0.5, "cutmix": 1.0, "smoothing": 0.1},
        {"rate": "0.2:0.5", "elastic": True, "accumulate": 2, "gradient_checkpointing": True},
        pytest.param({"qat": "int4", "dropout": 0.0, "gradient_checkpointing": True}, marks=ROUNDED),
    ],
    ids=lambda changes: "-".join(map(str, changes)) or "plain",
)
def test_a_run_goes_on_to_the_same_bits(
    changes: dict[str, Any],
    whole: dict[str, dict[str, bytes]],
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = options(tiny_backbone, tmp_path / "run", **changes)
    step = 9 if changes else 11  # checkpoints are after steps 4, 5, 8, 10, 12, 15
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt_at(step, patch)
        train(wanted)
    assert not (tmp_path / "run" / "result.json").exists()
    (left,) = (tmp_path / "run").glob(".partial-*")
    with pytest.raises(DataError, match=rf"{left} is interrupted, .* --resume"):
        evaluate_run(tmp_path / "run")
    with pytest.raises(DataError, match=rf"interrupted, and no row: {left}; .* --resume"):
        report([str(tmp_path)])
    started: list[int] = []
    plain = ProgressBar.on_train_begin

    def watched(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        started.append(state.global_step)
        plain(self, args, state, control, **more)

    monkeypatch.setattr(ProgressBar, "on_train_begin", watched)
    wanted.resume = True
    train(wanted)
    assert started == [8 if changes else 10]  # within an epoch, and at the end of one
    assert weights(tmp_path / "run") == whole[json.dumps(changes)]
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_a_finished_run_is_left_as_it_is(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options(tiny_backbone, tmp_path / "run", epochs=1, resume=True)  # nothing there: it starts
    first = train(wanted)
    monkeypatch.setattr(ImageTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train(wanted) == first
    with pytest.raises(OutputError, match="already holds a run"):
        train(options(tiny_backbone, tmp_path / "run", epochs=2, resume=True))


def test_a_half_written_checkpoint_is_not_read(
    whole: dict[str, dict[str, bytes]], tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(tiny_backbone, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt_at(11, patch)
        train(wanted)
    (staging,) = (tmp_path / "run").glob(".partial-*")
    newest = checkpoints.newest(staging / "checkpoints")
    assert newest is not None
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    older = checkpoints.newest(staging / "checkpoints")
    assert older is not None
    assert older != newest
    shutil.copytree(older, staging / "checkpoints" / "checkpoint-14")
    (staging / "checkpoints" / "checkpoint-14" / "complete.json").unlink()
    wanted.resume = True
    train(wanted)
    assert weights(tmp_path / "run") == whole["{}"]


def test_other_options_or_data_do_not_go_on(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt_at(6, patch)
        train(options(tiny_backbone, tmp_path / "run"))
    with pytest.raises(OutputError, match=r"other options \(--lr, --seed\)"):
        train(options(tiny_backbone, tmp_path / "run", lr=1e-2, seed=3, resume=True))
    (staging,) = (tmp_path / "run").glob(".partial-*")
    stored = json.loads((staging / "data.json").read_text())
    stored["splits"]["train"]["sha256"] = "0"
    (staging / "data.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="other data"):
        train(options(tiny_backbone, tmp_path / "run", resume=True))
    assert checkpoints.newest(staging / "checkpoints") is not None  # nothing was lost by asking
    capsys.readouterr()
    train(options(tiny_backbone, tmp_path / "run", epochs=1))
    assert f"{staging} is interrupted and stays; --resume goes on with it" in capsys.readouterr().err
    assert staging.is_dir()


@pytest.mark.parametrize(
    "sent",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],  # a training in a process each
)
def test_a_killed_process(
    sent: signal.Signals, whole: dict[str, dict[str, bytes]], tiny_backbone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pyra.scripts.train"]
    for flag, value in {
        "backbone": tiny_backbone, "output": run, "method": "pyra", "rate": 0.5, "epochs": EPOCHS, "save-steps": 4,
        "batch-size": 8, "limit": 40, "device": "cpu",
    }.items():  # fmt: skip
        command += [f"--{flag}", str(value)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not list(run.glob(".partial-*/checkpoints/*/complete.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    child.send_signal(sent)
    assert child.wait(timeout=60) == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert not (run / "result.json").exists()
    train(options(tiny_backbone, run, resume=True))
    assert weights(run) == whole["{}"]


def test_a_finished_run_of_other_data_is_not_taken_for_this_one(tiny_backbone: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(10):
        for colour in ("red", "blue"):
            (data / colour).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(data / colour / f"{number}.png")
    given = {"backbone": str(tiny_backbone), "data": str(data), "method": "linear", "epochs": 1, "device": "cpu"}
    train(RunOptions(**given, output=str(tmp_path / "run")))
    for number in range(10):
        Image.new("RGB", (8, 8), "green").save(data / "red" / f"{number}.png")
    with pytest.raises(DataError, match="made from other data"):
        train(RunOptions(**given, output=str(tmp_path / "run"), resume=True))
