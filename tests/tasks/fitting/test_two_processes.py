"""A run that two processes share is the run of one: the same losses, weights and answers; written and said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow(reason="processes of their own, which load torch, and two of them train")

SETTINGS = ("--limit", "39", "--epochs", "4", "--batch-size", "8", "--dropout", "0", "--drop-path", "0",
            "--device", "cpu", "--method", "pyra", "--rate", "0.5", "--lr", "1e-2")  # fmt: skip


def command(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``pyra train`` in so many processes, as a user starts them."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return subprocess.run(
        [*start, "pyra.scripts.train", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Adam divides by the size of a gradient, so weights whose gradients are near zero differ more than rounding does.

    Two processes that do not share their gradients differ by tens of per cent.
    """
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-2 * expected[name].norm(), name


@pytest.fixture(scope="module")
def runs(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """Folder and output of the same run in one process and in two."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for processes in (1, 2):
        output = folder / str(processes)
        done = command(processes, *SETTINGS, "--backbone", str(tiny_backbone), "--output", str(output))
        assert done.returncode == 0, done.stderr
        found[processes] = output, done.stdout + done.stderr
    return found


def test_losses_and_weights(runs: dict[int, tuple[Path, str]]) -> None:
    (one, _), (two, _) = runs[1], runs[2]
    alone, together = read(one, "training.json")["losses"], read(two, "training.json")["losses"]
    assert [entry["step"] for entry in together] == [entry["step"] for entry in alone] == [1, 4, 8, 10, 12, 16]
    assert [entry["loss"] for entry in together] == pytest.approx([entry["loss"] for entry in alone], rel=1e-5)
    assert alone[1]["loss"] != pytest.approx(alone[0]["loss"], rel=1e-3)
    assert_same(weights(two), weights(one))


def test_every_test_image_is_answered_once(runs: dict[int, tuple[Path, str]]) -> None:
    """39 images: the last turn of two processes has one to spare."""
    (one, _), (two, _) = runs[1], runs[2]
    answers = read(two, "predictions.json")
    assert len(answers["predictions"]) == 39
    assert answers == read(one, "predictions.json")
    assert read(two, "result.json")["value"] == read(one, "result.json")["value"]


def test_one_table_and_one_line_at_the_end(runs: dict[int, tuple[Path, str]]) -> None:
    for _, said in runs.values():
        assert said.count("saved to") == 1
        assert said.count("training: step 16 of 16") == 1
        assert "Warning" not in said


def test_a_batch_that_cannot_be_shared(tiny_backbone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = command(2, *SETTINGS, "--batch-size", "9", "--backbone", str(tiny_backbone), "--output", str(output))
    assert done.returncode != 0
    said = "pyra: error: --batch-size 9 cannot be shared by 2 processes: give a multiple of 2"
    assert done.stderr.count(said) == 1
    assert not output.exists()


def test_a_launcher_that_starts_one_process_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m",
         "pyra.scripts.train", "--method", "linear", "--backbone", "none", "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert "the launcher started one process" in done.stderr
    assert "none" in done.stderr.split("pyra: error: ")[1]


def sharded(*arguments: str, stop_after: int = 0) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "support" / "sharded_run.py"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(script),
            *arguments,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STOP_AFTER": str(stop_after)},
        timeout=240,
    )


def test_sharded_layers_are_trained_saved_and_taken_up_again(
    runs: dict[int, tuple[Path, str]], tiny_backbone: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "--backbone", str(tiny_backbone), "--save-steps", "3", "--output")
    done = sharded(*settings, str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SHARDED True") == 2
    found = weights(tmp_path / "whole")
    assert_same(found, weights(runs[1][0]))
    stopped = sharded(*settings, str(tmp_path / "parts"), stop_after=8)
    assert stopped.returncode != 0
    assert not (tmp_path / "parts" / "result.json").exists()
    again = sharded(*settings, str(tmp_path / "parts"), "--resume")
    assert again.returncode == 0, again.stderr
    assert "SHARDED" not in again.stdout  # which the first step prints: it went on from a later one
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)
