"""The presets are the paper's recipe, and are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyra.adapters import paper_recipe
from pyra.errors import ConfigError
from pyra.scripts.cli import parse
from pyra.tasks.presets import FOLDER
from pyra.tasks.protocols.options import ExperimentOptions

NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read(*arguments: str) -> ExperimentOptions:
    return parse(ExperimentOptions, arguments, prog="", description="", example="", presets=FOLDER)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_the_recipe(name: str) -> None:
    options = read("--config", name)
    recipe = paper_recipe(options.backbone.partition(".")[0], name.rpartition("-")[2])
    assert options.pyra_config() == recipe.pyra
    assert (options.peft, options.rank, options.dropout) == ("lora", recipe.peft.r, recipe.peft.lora_dropout)
    assert set(options.targets.split(",")) == recipe.peft.target_modules
    assert (options.lr, options.reactivation_lr, options.weight_decay) == (
        recipe.lr, recipe.reactivation_lr, recipe.weight_decay,
    )  # fmt: skip
    assert options.epochs == recipe.arguments["num_train_epochs"]
    assert options.batch_size == recipe.arguments["per_device_train_batch_size"]
    assert options.drop_path == recipe.model["drop_path_rate"]
    assert options.dtype == "float32"


def test_the_paper_has_three_models_and_two_levels() -> None:
    assert len(NAMES) == 6


def test_flags_win_over_a_preset() -> None:
    assert read("--config", "paper-high", "--epochs", "2").epochs == 2


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("paper-high").write_text("rate: 0.25\n")
    assert read("--config", "paper-high").rate == "0.25"


def test_a_name_that_is_no_preset() -> None:
    with pytest.raises(ConfigError, match=r"no preset \(did you mean 'paper-high'"):
        read("--config", "paper-hihg")
