"""The task that the files of a folder tell, where nobody names one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pyra.errors import DataError
from pyra.scripts.main import main
from pyra.tasks.language import inferring
from pyra.tasks.language.cards import find_text_card
from pyra.tasks.language.inferring import infer_task
from pyra.tasks.results import read_result

pytestmark = pytest.mark.usefixtures("no_cuda_extension")


def test_the_files_and_their_columns_tell_the_task(root: Path, backbones: dict[str, Path], tmp_path: Path) -> None:
    llama = str(backbones["llama"])
    assert infer_task(str(root / "gsm8k"), llama) == "gsm8k", "and not copy or lookup, which have the same files"
    assert infer_task(str(root / "sst2"), llama) == infer_task(str(root / "sst2"), None) == "sst2"
    assert infer_task(None, llama) is None
    assert infer_task(str(root), None) is None and infer_task("owner/name", "vit_base_patch16_224") is None
    shutil.copytree(root / "sst2", tmp_path / "part")
    (tmp_path / "part" / "dev.tsv").unlink()
    assert infer_task(str(tmp_path / "part"), None) is None


@pytest.mark.parametrize(
    "text", ["", "{", json.dumps({"question": "a"}), json.dumps({"question": "a", "solution": "1"}), "\xff"]
)
def test_a_folder_that_is_no_shipped_task_is_told(
    text: str, root: Path, backbones: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(root / "gsm8k" / "train.jsonl", tmp_path)
    (tmp_path / "test.jsonl").write_text(text, encoding="latin-1")
    assert infer_task(str(tmp_path), None) is None
    with pytest.raises(
        DataError, match=r"no shipped task, gsm8k \(train.jsonl, test.jsonl: question, answer\); sst2 \("
    ) as error:
        infer_task(str(tmp_path), str(backbones["bert"]))
    assert "--task" in str(error.value) and "\n" not in str(error.value)


def test_several_tasks_that_fit_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inferring, "_plain_cards", lambda: [find_text_card(name)[0] for name in ("gsm8k", "lookup")])
    with pytest.raises(DataError, match=r"fits several tasks \(gsm8k, lookup\): name one with --task"):
        infer_task(str(root / "gsm8k"), None)


def test_a_backbone_that_reads_text_shows_its_options(
    backbones: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for told in (["--backbone", str(backbones["llama"])], []):
        with pytest.raises(SystemExit):
            main(["train", *told, "--help"])
        said = capsys.readouterr().out
        assert ("--max-new-tokens" in said) == bool(told) and ("--image-size" in said) != bool(told)


@pytest.fixture
def quick(backbones: dict[str, Path], tmp_path: Path) -> Callable[..., int]:
    """Train a tiny decoder for a step or two with further flags."""

    def trained(*flags: str) -> int:
        given = ["train", "--backbone", str(backbones["llama"]), "--method", "lora", "--epochs", "1", "--limit", "4"]
        more = ["--max-new-tokens", "4", "--device", "cpu", "--output", str(tmp_path / "run"), "--overwrite"]
        return main([*given, *more, *flags])

    return trained


def test_a_run_takes_the_task_from_its_data(
    quick: Callable[..., int], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(root / "gsm8k")]
    assert quick(*data) == 0
    assert read_result(tmp_path / "run").task == "gsm8k"
    assert "has the files of --task gsm8k" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(f"data: {root / 'sst2'}\n")
    assert quick("--config", str(tmp_path / "config.yaml")) == 0
    assert read_result(tmp_path / "run").task == "sst2"
    capsys.readouterr()
    assert quick("--task", "copy", *data) == 0
    assert read_result(tmp_path / "run").task == "copy", "a task that is named wins"
    assert "--task gsm8k" not in capsys.readouterr().err
    assert quick("--data", str(root)) == 2
    told = capsys.readouterr().err
    assert "files and columns of no shipped task" in told and told.count("\n") == 1
    assert main(["evaluate", "--backbone", str(tmp_path), "--data", str(root)]) == 2
    assert "--backbone needs --task" in capsys.readouterr().err


def test_a_bare_backbone_is_asked_what_the_data_tells(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    given = ["evaluate", "--backbone", str(backbones["qwen"]), "--data", str(root / "sst2"), "--device", "cpu"]
    assert main([*given, "--limit", "4", "--output", str(tmp_path / "zero")]) == 0
    assert read_result(tmp_path / "zero").task == "sst2"
