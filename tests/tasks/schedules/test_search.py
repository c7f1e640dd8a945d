"""The search: shapes at one cost, the best of them, seeds, resuming, and what it says where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyra import PyraConfig
from pyra.backbones import wrapped_config, wrapped_schedule
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ConfigError, DataError
from pyra.schedule import check_schedule, solve_schedule
from pyra.tasks.data.task import load_task
from pyra.tasks.evaluation import data_for
from pyra.tasks.schedules import scores
from pyra.tasks.schedules.costs import CountedCosts
from pyra.tasks.schedules.latency import UnreachableError
from pyra.tasks.schedules.scores import Probe, ProbeScore, RunScore, features_of, trials_file
from pyra.tasks.schedules.search import BEND, LOG_WEIGHT, Shape, schedule_of_shape, search_schedule

SIZES = Geometry(6, 65, 1, 384, 384, 2 * 384 * 1536, 64, 64 * 384 * 588)
COSTS, BUDGET = CountedCosts(SIZES), geometry_macs(SIZES) * 0.6


def late(schedule: list[int]) -> float:
    """A score that likes late merging."""
    return sum(block * removed for block, removed in enumerate(schedule)) / max(sum(schedule), 1)


@settings(deadline=None, max_examples=40)
@given(st.floats(*BEND), *[st.floats(*LOG_WEIGHT)] * 3, st.floats(0.05, 0.6))
def test_every_shape_costs_the_budget(bend: float, early: float, middle: float, last: float, rate: float) -> None:
    budget = geometry_macs(SIZES) * (1 - rate)
    schedule = schedule_of_shape(Shape(bend, early, middle, last), COSTS, budget)
    check_schedule(schedule, SIZES)
    assert geometry_macs(SIZES, schedule) <= budget
    a_token = geometry_macs(SIZES) / SIZES.tokens
    assert geometry_macs(SIZES, schedule) >= budget - 2 * a_token


def test_the_solvers_equal_steps_are_one_of_the_shapes() -> None:
    assert schedule_of_shape(Shape(), COSTS, BUDGET) == solve_schedule(SIZES, rate=0.4)
    early = schedule_of_shape(Shape(early=1.5, late=-1.5), COSTS, BUDGET)
    assert early[0] > early[-1] and late(early) < late(solve_schedule(SIZES, rate=0.4))


def test_the_search_finds_what_scores(tmp_path: Path) -> None:
    start = solve_schedule(SIZES, rate=0.4)
    found = search_schedule(late, COSTS, BUDGET, trials=15, storage=tmp_path / "a.jsonl", start=[start])
    assert len(found.trials) == 16 and found.trials[0].schedule == start
    assert found.best.score == max(trial.score for trial in found.trials) > late(start)
    assert all(geometry_macs(SIZES, trial.schedule) <= BUDGET for trial in found.trials)
    least = search_schedule(
        late, COSTS, BUDGET, trials=5, storage=tmp_path / "b.jsonl", start=[start], higher_is_better=False
    )
    assert least.best.score == min(trial.score for trial in least.trials)


def test_where_nothing_is_better_the_start_stays(tmp_path: Path) -> None:
    start = solve_schedule(SIZES, rate=0.4)
    found = search_schedule(lambda _: 1.0, COSTS, BUDGET, trials=3, storage=tmp_path / "a.jsonl", start=[start])
    assert found.best.schedule == start and found.best.shape is None


def test_a_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = search_schedule(late, COSTS, BUDGET, trials=12, storage=tmp_path / "whole.jsonl", seed=3, start=[[0] * 6])

    calls: list[list[int]] = []

    def breaks(schedule: list[int]) -> float:
        calls.append(schedule)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return late(schedule)

    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search_schedule(breaks, COSTS, BUDGET, trials=12, storage=cut, seed=3, start=[[0] * 6])
    again = search_schedule(breaks, COSTS, BUDGET, trials=12, storage=cut, seed=3, start=[[0] * 6])
    assert again == whole
    assert len(calls) <= 8 + 12 - 6
    calls.clear()
    assert search_schedule(breaks, COSTS, BUDGET, trials=12, storage=cut, seed=3, start=[[0] * 6]) == whole
    assert calls == []
    other = search_schedule(late, COSTS, BUDGET, trials=12, storage=tmp_path / "other.jsonl", seed=4)
    assert [trial.shape for trial in other.trials] != [trial.shape for trial in whole.trials[1:]]


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    search_schedule(late, COSTS, BUDGET, trials=1, storage=file, settings={"task": "demo"})
    with pytest.raises(DataError, match=r"another search \(seed, task differ\)"):
        search_schedule(late, COSTS, BUDGET, trials=1, storage=file, seed=1, settings={"task": "pets"})
    file.write_text("no journal\n")
    with pytest.raises(DataError, match="no journal"):
        search_schedule(late, COSTS, BUDGET, trials=1, storage=file)


@pytest.mark.parametrize("torn", [b"{", b'{"op_code": 4, "worker', b"\xff\xfe"])
def test_a_line_that_a_killed_process_left_unfinished_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    first = search_schedule(late, COSTS, BUDGET, trials=4, storage=file)
    with file.open("ab") as stream:
        stream.write(torn)
    again = search_schedule(late, COSTS, BUDGET, trials=6, storage=file)
    assert again.trials[:4] == first.trials and len(again.trials) == 6


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"[1]\n", b'{"op_code": "0"}\n', b"\xff\n"])
def test_a_file_that_is_no_journal_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="is no journal of a search: remove it"):
        search_schedule(late, COSTS, BUDGET, trials=2, storage=file)
    assert file.read_bytes() == content


def test_what_cannot_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    with pytest.raises(UnreachableError):
        search_schedule(late, COSTS, 1.0, trials=1, storage=file)
    with pytest.raises(ConfigError, match="--trials"):
        search_schedule(late, COSTS, BUDGET, trials=0, storage=file)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'pyra-adapt\[sweeps\]'"):
        search_schedule(late, COSTS, BUDGET, trials=1, storage=file)
    assert not file.exists()


def test_the_probe_tells_classes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 3.0 * torch.nn.functional.one_hot(labels, 5).float() + 0.3 * torch.randn(60, 5, generator=generator)
    probe = Probe.fitted(features, labels, 3)
    assert torch.equal(probe(features).argmax(1), labels)
    assert not torch.equal(probe(features.flip(1)).argmax(1), labels)


def test_scores_are_of_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=0).eval()
    data = data_for(model, load_task("demo"), "validation", limit=24, cache=False)
    features = features_of(model, data)
    probe = Probe.fitted(features, torch.tensor(data.labels), 10)
    ran: list[list[int] | None] = []

    def watched(merged: nn.Module, *more: object) -> torch.Tensor:
        ran.append(wrapped_schedule(merged))
        return features_of(merged, *more)

    monkeypatch.setattr(scores, "features_of", watched)
    score = ProbeScore(model, PyraConfig(rate=0.5), probe, data)
    unmerged = float((probe(features).argmax(1) == torch.tensor(data.labels)).double().mean())
    assert score([0, 0, 0]) == pytest.approx(unmerged)
    assert 0 <= score([20, 10, 5]) <= 1
    assert ran == [[0, 0, 0], [20, 10, 5]]
    assert wrapped_config(model) is None
    headed = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10).eval()
    run = RunScore(headed, PyraConfig(rate=0.5, reactivation=False), data)
    first = run([20, 10, 5])
    assert wrapped_schedule(headed) == [20, 10, 5]
    run([0, 4, 4])
    assert wrapped_schedule(headed) == [0, 4, 4]
    assert run([20, 10, 5]) == first


def test_the_journal_lies_beside_the_output() -> None:
    assert trials_file("runs/fast.json") == Path("runs/fast.trials.jsonl")
