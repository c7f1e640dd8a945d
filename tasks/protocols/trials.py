"""One candidate of a protocol, trained to be judged and then forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets

from pyra.errors import DataError, TrainingError
from pyra.files import read_json, write_json
from pyra.tasks.data.task import Task
from pyra.tasks.fitting import processes
from pyra.tasks.fitting.fit import Watch, fit, forget_checkpoints
from pyra.tasks.options import RunOptions
from pyra.tasks.probing import FeatureStore
from pyra.tasks.protocols.choosing import Trial
from pyra.tasks.resuming import is_finished, shared_output
from pyra.tasks.runs import DATA, OPTIONS, data_record, new_model, stored_options
from pyra.tasks.training import decode, ready

FILE = "trial.json"


def judged(
    options: RunOptions,
    task: Task,
    changes: dict[str, Any],
    training: datasets.Dataset,
    watched: datasets.Dataset,
    patience: int | None,
    store: FeatureStore | None = None,
) -> Trial:
    """Train a candidate and return the score of every epoch; with ``options.resume`` what is there is used.

    A candidate whose training diverges has no score, and is not chosen.

    Args:
        options: of the candidate; its output folder gets ``trial.json``.
        task: with everything but its test split replaced by the next two.
        changes: what the candidate changes.
        training: images to train on.
        watched: images to score after every epoch.
        patience: stop after so many epochs without a better score.
        store: of the features of a probe.
    """
    device = ready(options)
    if options.resume and processes.on_main(lambda: is_finished(options, task, "trial", FILE)):
        return Trial(changes, _read(Path(options.output).expanduser() / FILE))
    model = new_model(options, len(task.labels))
    parts = dataclasses.replace(task, splits={**task.splits, "train": training, "watched": watched})
    with shared_output(options, task, "trial") as folder:
        processes.on_main(lambda: write_json(folder / OPTIONS, stored_options(options)))
        processes.on_main(lambda: write_json(folder / DATA, data_record(task)))
        data, held = decode(options, parts, model, "train"), decode(options, parts, model, "watched")
        watch = Watch(held, task.metric, task.higher_is_better, patience=patience)
        try:
            scores = fit(model, data, options, folder, device, watch=watch, store=store).scores
        except TrainingError:
            scores = []

        def finish() -> None:
            write_json(folder / FILE, {"changes": changes, "scores": scores})
            forget_checkpoints(folder)

        processes.on_main(finish)
    return Trial(changes, scores)


def _read(file: Path) -> list[tuple[float, float]]:
    try:
        return [(float(epoch), float(score)) for epoch, score in read_json(file)["scores"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} is damaged: remove its folder, and --resume tries that candidate again") from None
