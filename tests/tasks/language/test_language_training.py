"""Runs on texts are trained, interrupted, stored and shown as runs on images are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError, DataError, OutputError
from pyra.scripts.main import main
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.language.evaluation import Evaluation, evaluate_backbone, evaluate_language_run
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.training import train_language
from pyra.tasks.results import read_result, read_result_file

pytestmark = pytest.mark.usefixtures("no_cuda_extension")


class Interruption(BaseException):
    """Stands for whatever ends a process from outside."""


def options(backbone: Path, root: Path, output: Path, **changes: Any) -> LanguageOptions:
    settings = {"task": "sst2", "epochs": 2, "batch_size": 8, "device": "cpu", "lr": 3e-3, "save_steps": 3}
    return LanguageOptions(backbone=str(backbone), root=str(root), output=str(output), **{**settings, **changes})


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"answer": "scoring"}, {"method": "adalora", "targets": "q_proj,v_proj"}, {"method": "full", "accumulate": 2}],
    ids=["lora", "adalora", "full"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    changes: dict[str, Any], backbones: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_language(options(backbones["llama"], root, tmp_path / "whole", **changes))
    wanted = options(backbones["llama"], root, tmp_path / "run", **changes)
    plain = ProgressBar.on_step_end

    def end(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        plain(self, args, state, control, **more)
        if state.global_step == 8:  # five steps an epoch, checkpoints after 3, 5, 6, 9, 10
            raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(ProgressBar, "on_step_end", end)
        train_language(wanted)
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(OutputError, match=r"was begun with other options \(--lr\)"):
        train_language(options(backbones["llama"], root, tmp_path / "run", **{**changes, "lr": 1e-3, "resume": True}))
    started: list[int] = []
    begin = ProgressBar.on_train_begin

    def watched(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        started.append(state.global_step)
        begin(self, args, state, control, **more)

    monkeypatch.setattr(ProgressBar, "on_train_begin", watched)
    wanted.resume = True
    result, _ = train_language(wanted)
    assert started == [6]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".partial-*")) and not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(KeepingTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train_language(wanted) == (result, [])


def test_a_result_says_what_it_was_made_of(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    row, _ = train_language(options(backbones["llama"], root, tmp_path / "run", answer="scoring", limit=24))
    assert (row.schema_version, row.protocol, row.split, row.unit) == (2, "fixed", "test", "examples")
    assert (row.task_version, row.data_source, row.preprocessing) == ("1", f"{root.name}/sst2", "text")
    assert row.train_sha256 and row.test_sha256 and row.weights_sha256 and row.majority_value == 0.5
    assert row.adapter is not None and row.adapter["peft"]["peft_type"] == "LORA" and row.adapter["pyra"] is None
    assert row.settings is not None and (row.settings["answer"], row.settings["max_length"]) == ("scoring", 256)
    assert not {"output", "root", "device", "seed"} & set(row.settings)
    assert row.wall_seconds and row.train_seconds and row.wall_seconds > row.train_seconds
    assert row.peak_memory_bytes and row.images_per_second
    stored = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert stored["sha256"] == row.test_sha256
    assert json.loads((tmp_path / "run" / "training.json").read_text())["losses"]
    asked = Evaluation(device="cpu", split="validation", num_fewshot=1)
    other, file, _ = evaluate_language_run(tmp_path / "run", asked)
    assert read_result_file(file) == other
    assert (other.split, other.num_test, other.train_sha256) == ("validation", 8, row.train_sha256)
    assert other.test_sha256 != row.test_sha256 and (other.settings or {})["num_fewshot"] == 1
    again, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    assert again.test_sha256 == row.test_sha256 and again.settings == row.settings
    zero, _ = evaluate_backbone(str(backbones["llama"]), "sst2", Evaluation(device="cpu"), root=str(root))
    assert zero.weights_sha256 == row.weights_sha256 and zero.train_sha256 is None and zero.adapter is None


def test_the_table_of_results_holds_texts_beside_images(
    backbones: dict[str, Path], root: Path, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    texts = ["train", "--task", "sst2", "--backbone", str(backbones["bert"]), "--root", str(root), "--epochs", "1"]
    for method in ("lora", "linear"):
        own = ["--method", method, "--seeds", "2", "--device", "cpu", "--output", str(runs / method)]
        assert main([*texts, *own]) == 0
    assert sorted(path.name for path in (runs / "lora").iterdir()) == ["seed-0", "seed-1"]
    sums = options(backbones["llama"], root, runs / "g", task="gsm8k", epochs=1, max_new_tokens=4)
    train_language(sums)
    given = ["train", "--task", "demo", "--method", "lora", "--backbone", str(tiny_backbone), "--epochs", "0.1"]
    assert main([*given, "--limit", "20", "--device", "cpu", "--output", str(runs / "images")]) == 0
    capsys.readouterr()
    assert main(["results", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "demo" in shown and "gsm8k" in shown and "examples/s" in shown and "cannot be compared" not in shown
    (line,) = [line for line in shown.splitlines() if "sst2" in line and " lora " in line]
    assert "0,1" in line and "±" in line, "two seeds are one row"
    assert "no linear probe" in shown and "on sst2" not in shown and "on gsm8k" not in shown
    assert main(["results", str(runs), "--where", "task=sst2", "--compare", "linear"]) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_a_folder_of_files_is_data(
    backbones: dict[str, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--task", "sst2", "--backbone", str(backbones["bert"]), "--epochs", "1", "--device", "cpu"]
    assert main([*given, "--data", str(root / "sst2"), "--output", str(tmp_path / "run")]) == 0
    assert read_result(tmp_path / "run").data_source == "sst2"
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    for flags, message in {
        ("--data", str(tmp_path / "none")): "is not there: task sst2 is read from train.tsv",
        ("--data", str(root)): "has no train.tsv, dev.tsv, test.tsv",
        ("--data", " "): "--data is empty",
        ("--method", "pyra"): "--method pyra needs --rate",
        ("--data", str(root / "sst2"), "--method", "pyra", "--rate", "0.5"): "BertModel cannot be merged",
        ("--data", str(root), "--root", str(root)): "give --root or --data, not both",
    }.items():
        assert main([*given, *flags, "--output", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name in ("train", "dev", "test"):
        (wrong / f"{name}.tsv").write_text("text\tscore\na fine film\t1\n")
    with pytest.raises(DataError, match="no column label"):
        train_language(LanguageOptions(backbone=str(backbones["bert"]), data=str(wrong), output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="--batch-size 8 cannot be shared by 1 process times 3 parts"):
        train_language(options(backbones["bert"], root, tmp_path / "x", accumulate=3))


@pytest.mark.slow  # two processes start
def test_two_processes_train_as_one(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    own = options(backbones["llama"], root, tmp_path / "one", answer="scoring", dropout=0.0, epochs=1, limit=15)
    one, _ = train_language(own)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = "--task sst2 --answer scoring --dropout 0 --epochs 1 --batch-size 8 --lr 3e-3 --limit 15 --device cpu"
    places = ["--backbone", str(backbones["llama"]), "--root", str(root), "--output", str(tmp_path / "two")]
    told = subprocess.run(
        [*command, "-m", "pyra.scripts.train", *flags.split(), *places],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert told.returncode == 0, told.stderr[-2000:]
    two = read_result(tmp_path / "two")
    assert told.stdout.count("saved to") == 1
    assert two.num_test == 15 and two.test_sha256 == one.test_sha256
    losses = [json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("one", "two")]
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], abs=1e-4)
    answers = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "two")]
    assert answers[0]["labels"] == answers[1]["labels"]
