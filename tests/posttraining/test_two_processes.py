"""Two processes on the CPU train on chats and preferences as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyra.scripts.main import main
from pyra.tasks.results import read_result

WORKER = Path(__file__).parent.parent / "support" / "module_and_its_threads.py"
FLAGS = {
    "sft": "--method pyra --keep 0:0.5 --targets q_proj,v_proj --epochs 1 --batch-size 8 --lr 1e-2 --device cpu",
    "dpo": "--method lora --targets q_proj,v_proj --epochs 1 --batch-size 8 --lr 1e-2 --device cpu",
}


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


@pytest.mark.slow  # two processes start
@pytest.mark.parametrize("verb", FLAGS)
def test_two_processes_train_as_one(verb: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    llama, data = request.getfixturevalue("llama"), request.getfixturevalue("chats" if verb == "sft" else "pairs")
    flags = [*FLAGS[verb].split(), "--backbone", str(llama), "--data", str(data), "--output"]
    assert main([verb, *flags, str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(WORKER), f"pyra.scripts.{verb}", *flags, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sys.platform != "linux" or done.stdout.count("THREADS []") == 2, done.stdout
    assert done.stdout.count("saved to") == 1 and "Warning" not in done.stderr
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    assert [entry["loss"] for entry in two["losses"]] == pytest.approx(
        [entry["loss"] for entry in one["losses"]], rel=1e-4
    )
    for name, value in one["held_out"].items():
        assert two["held_out"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert read_result(tmp_path / "two").test_sha256 == read_result(tmp_path / "one").test_sha256
