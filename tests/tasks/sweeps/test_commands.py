"""Printed commands do what they say, whatever a folder is called."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest

from pyra.tasks.sweeps.commands import PLACE, commands


@pytest.mark.parametrize("name", ["a b", "$HOME", "it's", 'say "hi"', "-rf", "a;b", "load_run", "back\\slash", "ü"])
@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_folder_of_any_name_is_one_argument(name: str, rate: float | None) -> None:
    run = Path(name)
    evaluate, export, use = commands("images", run, rate)
    asked = [] if rate is None else ["--rate", "0.5"]
    for command, verb in ((evaluate, "evaluate"), (export, "export")):
        words = shlex.split(command.text)
        assert words[:2] == ["pyra", verb] and Path(words[2]) == run and not words[2].startswith("-")
        assert words[3 : 3 + len(asked)] == asked
    calls = [node for node in ast.walk(ast.parse(use.text)) if isinstance(node, ast.Call)]
    (call,) = [one for one in calls if isinstance(one.func, ast.Name) and one.func.id in ("load_run", "run_at_rate")]
    assert [ast.literal_eval(argument) for argument in call.args] == [name, *([] if rate is None else [rate])]


def test_without_a_folder_its_place_is_named_and_texts_are_only_evaluated() -> None:
    assert all(PLACE in command.text for command in commands("images"))
    assert [command.does for command in commands("sequences")] == ["Evaluate"]
