"""``pyra train --elastic`` and ``pyra evaluate --rate``, on a tiny backbone and real pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.fitting.trainer import ImageTrainer
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import load_run
from pyra.tasks.training import train


def options(backbone: Path, output: Path, **changes: Any) -> RunOptions:
    settings = {"method": "pyra", "rate": "0.2:0.5", "elastic": True, "epochs": 1, "limit": 40, "batch_size": 8}
    return RunOptions(backbone=str(backbone), output=str(output), device="cpu", **{**settings, **changes})


@pytest.mark.parametrize("distill", [False, True])
def test_one_run_at_every_rate(
    distill: bool, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, plain = [], ImageTrainer.compute_loss

    def watched(self: ImageTrainer, model: Any, *arguments: Any, **more: Any) -> Any:
        loss = plain(self, model, *arguments, **more)
        rates.append(model.get_base_model().pyra_config.rate)
        return loss

    monkeypatch.setattr(ImageTrainer, "compute_loss", watched)
    trained = train(options(tiny_backbone, tmp_path / "run", distill=distill))
    assert rates[0::2] == [0.2] * 5 and rates[3] == rates[7] == 0.5 and len(rates) == 10
    assert all(0.2 < rate < 0.5 for rate in rates[1::4])
    assert trained.rate == pytest.approx(0.5, abs=0.02)
    stored = json.loads((tmp_path / "run" / "adapter" / "pyra_config.json").read_text())
    assert stored["rate_range"] == [0.2, 0.5] and stored["rate"] == 0.5
    macs = []
    for rate in (0.2, 0.35, 0.5):
        found = evaluate_run(tmp_path / "run", device="cpu", rate=rate)
        assert found.rate == pytest.approx(rate, abs=0.02)
        assert (tmp_path / "run" / f"evaluation-rate-{rate}.json").is_file()
        macs.append(found.macs)
    assert macs == sorted(macs, reverse=True)
    assert evaluate_run(tmp_path / "run", device="cpu").value == pytest.approx(trained.value)
    with pytest.warns(UserWarning, match="outside what these weights are for"):
        evaluate_run(tmp_path / "run", device="cpu", rate=0.55)
    assert load_run(tmp_path / "run")[0].pyra_config.rate_range == [0.2, 0.5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"elastic": False}, "--rate 0.2:0.5 is a range: add --elastic"),
        ({"rate": 0.5}, "--elastic needs a range of rates, such as --rate 0.3:0.8"),
        ({"rate": "0.5:0.2"}, "two that rise within"),
        ({"rate": "0.2:0.5:0.7"}, "two that rise within"),
        ({"rate": "low:high"}, "--rate must be a number, or two as in 0.3:0.8, got 'low:high'"),
        ({"rate": "0.5", "elastic": False, "distill": True}, "--distill goes with --elastic"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        options(tmp_path, tmp_path / "run", **changes)


def test_a_run_that_merges_nothing_has_no_rate(tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "run", method="lora", rate=None, elastic=False))
    with pytest.raises(ConfigError, match="trained with --method lora, which merges nothing"):
        evaluate_run(tmp_path / "run", device="cpu", rate=0.5)


def test_a_wrong_rate_hides_no_other_problem(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--lr must be above 0 and below 1e9, got -1; rate must be a number in \[0, 1\)"
    ):
        options(tmp_path, tmp_path / "run", rate=1.5, elastic=False, lr=-1)
