"""Two processes on the CPU train on rewards: they share each rollout, and end with the same weights and curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_worker
from tiny_language import decoder, save, tokenizer

from pyra.tasks.posttraining.rl_options import RlOptions
from pyra.tasks.posttraining.runs import load_posttrained
from pyra.tasks.results import read_result

pytestmark = pytest.mark.slow  # two processes start, twice

GREEDY = 1e-5
"""A temperature at which answers are drawn alike, however the processes draw."""
SETTINGS: dict[str, Any] = {
    "task": "arithmetic",
    "steps": 4,
    "updates": 2,
    "batch_size": 8,
    "group": 4,
    "max_new_tokens": 4,
    "problems": 30,
    "test_problems": 7,
    "targets": "q_proj,v_proj",
    "lr": 1e-2,
    "device": "cpu",
    "group_c_plus": 0.08,
    "group_c_minus": 0.06,
    "group_eps": 0.02,
}


def in_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a file or a module in two processes, as a user starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(decoder(spread=0.05), tokenizer(pad=True), tmp_path_factory.mktemp("two") / "backbone"))


@pytest.fixture(scope="module")
def folder(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes did runs: ``drawn`` with one prompt shared by both, the same interrupted, and ``greedy``."""
    place = tmp_path_factory.mktemp("runs")
    own = {
        "drawn": {"group": 8},
        "interrupted": {"group": 8, "save_steps": 1, "interrupted_in": 2},
        "greedy": {"temperature": GREEDY},
    }
    wanted = [{**SETTINGS, "backbone": backbone, "output": str(place / name), **more} for name, more in own.items()]
    (place / "wanted.json").write_text(json.dumps(wanted))
    done = in_two(rl_worker.__file__, str(place / "wanted.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def told(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def test_both_end_with_the_same(folder: Path) -> None:
    first, second = told(folder, "drawn")
    assert first["moved"] > 1e-4 and first == second
    assert [entry["step"] for entry in first["curves"]] == [1, 2, 3, 4]
    assert all(("reward" in entry) == (place % 2 == 0) for place, entry in enumerate(first["curves"]))
    assert all(entry["groups_passing"] <= 1 and entry["entropy"] > 0 for entry in first["curves"])
    stored = json.loads((folder / "drawn" / "training.json").read_text())
    assert stored["losses"] == first["curves"] and stored["held_out"]["questions"] == 7


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    first, second = told(folder, "interrupted")
    whole, _ = told(folder, "drawn")
    assert first == second
    for name in ("weights", "moved", "value", "curves"):
        assert first[name] == whole[name], name


def test_samples_without_a_reward_are_those_of_both(folder: Path) -> None:
    first, _ = told(folder, "drawn")
    marked = [entry["rewards/digits/failed"] for entry in first["curves"] if "reward" in entry]
    number = round(sum(marked) * 8)
    assert number > 0 and f"reward digits: no number for {number} of 16 answers" in first["notes"]


def test_a_rollout_is_that_of_one_process(folder: Path, backbone: str, tmp_path: Path) -> None:
    first, second = told(folder, "greedy")
    with pytest.warns(UserWarning, match="'digits' returned nan"):
        alone = rl_worker.told(
            {**SETTINGS, "backbone": backbone, "output": str(tmp_path / "one"), "temperature": GREEDY}
        )
    rewards = [[entry["reward"] for entry in one["curves"] if "reward" in entry] for one in (first, second, alone)]
    assert rewards[0] == rewards[1] == pytest.approx(rewards[2]) and len(set(rewards[2])) == 2
    for name in ("length", "cut", "groups_alike", "rewards/digits/failed"):
        found, expected = ([entry.get(name) for entry in one["curves"]] for one in (first, alone))
        assert found == pytest.approx(expected), name
    two, one = (json.loads((place / "predictions.json").read_text()) for place in (folder / "greedy", tmp_path / "one"))
    assert two == one and len(two["predictions"]) == 7


def test_the_command(backbone: str, tmp_path: Path) -> None:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = in_two("-m", "pyra.scripts.rl", "--backbone", backbone, *flags, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1 and "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    result = read_result(tmp_path / "run")
    assert (result.metric, result.num_test, result.batch_size) == ("exact_match", 7, 8) and result.answer_tokens
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert isinstance(load_posttrained(tmp_path / "run")[1], RlOptions)
