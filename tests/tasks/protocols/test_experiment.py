"""Experiments on a tiny backbone: what each protocol looks at, and what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import DataError, OutputError
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.evaluation import caution, evaluate_run
from pyra.tasks.fitting import fit as fitting
from pyra.tasks.protocols.experiment import experiment
from pyra.tasks.protocols.options import ExperimentOptions
from pyra.tasks.results import read_result


def options(backbone: Path, folder: Path, **changes: Any) -> ExperimentOptions:
    values: dict[str, Any] = {
        "method": "tome", "rate": 0.5, "epochs": 2, "batch_size": 10, "limit": 40, "device": "cpu", "seeds": 2,
        "baselines": False, **changes,
    }  # fmt: skip
    return ExperimentOptions(backbone=str(backbone), output=str(folder), **values)


def training_of(run: Path) -> Any:
    return json.loads((run / "training.json").read_text())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the splits that were scored in training, one entry an epoch."""
    found: list[str] = []
    plain = fitting._score

    def watched(trained: Any, examples: Any, *arguments: Any) -> float:
        found.append(examples.source(0).partition(".")[0] if isinstance(examples, ImageDataset) else "features")
        return plain(trained, examples, *arguments)

    monkeypatch.setattr(fitting, "_score", watched)
    return found


def test_validation_protocol(tiny_backbone: Path, tmp_path: Path, looks: list[str]) -> None:
    folder = tmp_path / "x"
    wanted = options(tiny_backbone, folder, protocol="validation", tune="lr=1e-3:2e-2")
    results = experiment(wanted)
    assert looks == ["validation"] * 4  # two epochs of each candidate; the test split in none
    assert [result.seed for result in results] == [0, 1]
    record = json.loads((folder / "selection.json").read_text())
    scores = {trial["changes"]["lr"]: max(score for _, score in trial["scores"]) for trial in record["trials"]}
    assert record["chosen"]["score"] == max(scores.values())
    assert set(record["images"].values()) == {40}  # of --limit
    for number, result in enumerate(results):
        run = folder / f"seed-{number}"
        assert result == read_result(run)
        assert result.protocol == "validation"
        assert result.chosen is not None
        assert result.chosen["lr"] == record["chosen"]["changes"]["lr"]
        assert json.loads((run / "options.json").read_text())["lr"] == result.chosen["lr"]
    assert results[0].train_sha256 == results[1].train_sha256
    again = evaluate_run(folder / "seed-1", device="cpu")
    assert again.value == results[1].value
    assert caution(again) is None
    seen = evaluate_run(folder / "seed-1", device="cpu", split="validation")
    assert "chose the settings" in str(caution(seen))


def test_published_protocol_reports_the_best_epoch_of_the_test_split(
    tiny_backbone: Path, tmp_path: Path, looks: list[str]
) -> None:
    results = experiment(options(tiny_backbone, tmp_path / "x", protocol="published", lr=2e-2, epochs=3))
    assert looks == ["test"] * 6
    for number, result in enumerate(results):
        scores = training_of(tmp_path / "x" / f"seed-{number}")["scores"]
        assert result.value == max(score for _, score in scores)
        assert result.protocol == "published"
        assert "test split" in str(result.selection)
        best = max(scores, key=lambda one: one[1])
        assert result.chosen == {"epoch": best[0], "test_score": best[1]}
    assert [entry["step"] for entry in training_of(tmp_path / "x" / "seed-0")["losses"]] == [1, 4, 8, 10, 12]


@pytest.mark.slow  # an experiment several times over
def test_an_experiment_goes_on_where_it_was(
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {"protocol": "validation", "tune": "lr=1e-3:2e-2", "baselines": True}
    monkeypatch.setattr("pyra.tasks.protocols.experiment.LINEAR_EPOCHS", 3.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("pyra.tasks.protocols.experiment.train", stop)
        experiment(options(tiny_backbone, tmp_path / "x", **changes))
    assert f"below {tmp_path / 'x'} is kept; the same line with --resume" in capsys.readouterr().err
    with pytest.raises(DataError, match="no run of it is finished, --resume"):
        evaluate_run(tmp_path / "x")
    assert len(looks) == 4
    with pytest.raises(OutputError, match=r"other options \(--lr\)"):
        experiment(options(tiny_backbone, tmp_path / "x", **changes, lr=0.5, resume=True))
    with pytest.raises(OutputError, match="already holds an experiment: pass --resume to go on with it"):
        experiment(options(tiny_backbone, tmp_path / "x", **changes))
    results = experiment(options(tiny_backbone, tmp_path / "x", **changes, resume=True))
    assert [(result.method, result.seed) for result in results] == [
        ("tome", 0), ("tome", 1), ("linear", 0), ("linear", 1),
    ]  # fmt: skip
    assert looks[4:] == ["features"] * 3 * 3  # the trials of the probe; those of the method were not repeated
    whole = experiment(options(tiny_backbone, tmp_path / "y", **changes))
    assert [result.value for result in whole] == [result.value for result in results]


def test_patience_stops_a_candidate(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.3, 0.5, 0.4, 0.5, 0.9, 0.9])
    monkeypatch.setattr(fitting, "_score", lambda *_: next(values))
    experiment(options(tiny_backbone, tmp_path / "x", protocol="validation", patience=2, epochs=6, seeds=1))
    record = json.loads((tmp_path / "x" / "selection.json").read_text())
    assert [score for _, score in record["trials"][0]["scores"]] == [0.3, 0.5, 0.4, 0.5]
    assert record["chosen"]["epoch"] == 2.0
    losses = json.loads((tmp_path / "x" / "seed-0" / "training.json").read_text())["losses"]
    assert losses[0]["step"] == 1
    assert all(entry["epoch"] <= 2.0 for entry in losses)  # all six epochs would log the tenth step, in the third


def test_seeds_without_a_protocol(tiny_backbone: Path, tmp_path: Path) -> None:
    results = experiment(options(tiny_backbone, tmp_path / "x", method="linear", rate=None, seed=5))
    assert [result.seed for result in results] == [5, 6]
    assert {result.protocol for result in results} == {"fixed"}
    assert results[0].value != results[1].value or results[0].seed != results[1].seed


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("experiment.json", "{"), ("experiment.json", "[]"), ("trials/0/trial.json", "{"),
        ("trials/0/trial.json", "{}"), ("trials/0/trial.json", '{"scores": "abc"}'),
        ("trials/0/trial.json", '{"scores": [[1.0, null]]}'), ("seed-0/result.json", "{"), ("seed-0/result.json", "{}"),
    ],
)  # fmt: skip
def test_damaged_files_of_an_experiment_are_named(
    file: str, text: str, tiny_backbone: Path, tmp_path: Path, tried: Path
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(tried, folder)
    (folder / file).write_text(text)
    told = rf"{file}.*; remove {folder}/seed-0 to train" if "seed-0" in file else rf"{file} is damaged"
    with pytest.raises((OutputError, DataError), match=told):
        experiment(options(tiny_backbone, folder, protocol="validation", epochs=1, seeds=1, resume=True))


@pytest.fixture(scope="module")
def tried(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment."""
    folder = tmp_path_factory.mktemp("tried") / "x"
    experiment(options(tiny_backbone, folder, protocol="validation", epochs=1, seeds=1))
    return folder
