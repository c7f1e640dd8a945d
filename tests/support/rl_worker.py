"""Each process of a distributed ``pyra rl`` tells what it ends with: `torchrun` runs this file.

It is given a JSON file with a list of options of runs, one after another, and writes ``<output>-<rank>.json`` for each.
A run with ``interrupted_in`` is interrupted in that rollout, from 1, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

from pyra.tasks.fitting import processes
from pyra.tasks.posttraining import rl
from pyra.tasks.posttraining.rl_options import RlOptions


def digits(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward that answers of random weights differ in, and that one answer in five does not have."""
    found = [sum(map(ord, one[0]["content"])) % 5 for one in completions]
    return [float("nan") if value == 4 else float(value) for value in found]


def interrupted(values: dict[str, Any], rollout: int) -> None:
    """Begin a run that is interrupted in a rollout, counted from 1."""
    seen = []

    def stops(completions: list[Any], **_: Any) -> list[float | None]:
        seen.append(len(completions))
        if len(seen) == rollout:
            raise KeyboardInterrupt
        return digits(completions)

    try:
        rl.train_rl(RlOptions(**values), {"digits": stops})
    except KeyboardInterrupt:
        return
    raise AssertionError(f"the run had {len(seen)} rollouts and ended")


def told(values: dict[str, Any]) -> dict[str, Any]:
    """Return what this process knows at the end of a run: its weights, curves, notes and value."""
    weights = hashlib.sha256()
    plain = rl.fit_policy

    def fit(model: Any, *arguments: Any) -> Any:
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        fitted = plain(model, *arguments)
        for name, value in model.named_parameters():
            weights.update(value.detach().numpy().tobytes())
            moved.append(float((value - before[name]).detach().abs().max()))
        return fitted

    moved: list[float] = []
    with mock.patch.object(rl, "fit_policy", fit):
        result, notes, curves = rl.train_rl(RlOptions(**values), {"digits": digits})
    return {
        "weights": weights.hexdigest(), "moved": max(moved), "curves": curves, "notes": notes, "value": result.value,
    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        if rollout := one.pop("interrupted_in", None):
            interrupted(one, rollout)
            one["resume"] = True
        found = json.dumps(told(one))
        Path(f"{one['output']}-{processes.rank()}.json").write_text(found)
    processes.leave()
