"""Several runs of one method on one task by a protocol, beside a linear probe.

experiment/
experiment.json   the options
selection.json    what was tried, on which images, and what was chosen
trials/N/         a candidate and its scores, epoch by epoch
seed-N/           a run (pyra.tasks.runs)
linear/           selection.json, trials/ and seed-N/ of the probe
summary.md        the table
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import datasets

from pyra.errors import OutputError, TrainingError
from pyra.files import read_json, write_json
from pyra.tasks.data.task import Task
from pyra.tasks.fitting import processes
from pyra.tasks.output import claimed_output
from pyra.tasks.probing import FeatureStore
from pyra.tasks.protocols.choosing import Choice, ChoosingSplits, Trial, choose, choosing_splits
from pyra.tasks.protocols.options import ExperimentOptions, differing, plain
from pyra.tasks.protocols.trials import judged
from pyra.tasks.results import RunResult
from pyra.tasks.resuming import several
from pyra.tasks.runs import new_model, task_for
from pyra.tasks.training import Plan, ready, refuse_output_in_data, train, warn_of_shared

EXPERIMENT, SELECTION, TRIALS, LINEAR = "experiment.json", "selection.json", "trials", "linear"
LINEAR_EPOCHS, LINEAR_LR, LINEAR_TUNE = 30.0, 1e-2, "lr=0.001:0.01:0.1"
"""The probe's passes over its stored features and learning rate, and what it chooses from where there is a protocol."""


def experiment(options: ExperimentOptions) -> list[RunResult]:
    """Run an experiment and write its folder; returns the results of the method and, after them, of the probe.

    With ``options.resume`` finished trials and runs are kept, and interrupted ones go on. In a distributed run every
    process calls this.

    Raises:
        OutputError: where the folder holds something else, or an experiment of other options.
        PyraError: as of :func:`pyra.tasks.training.train`.
    """
    ready(options)
    refuse_output_in_data(options)
    task = task_for(options)
    warn_of_shared(options, task)
    new_model(options, len(task.labels))  # what is wrong with the backbone is found before the folder is touched
    folder = processes.on_main(lambda: _opened(options))
    with several(folder):
        results = _by_protocol(options, task, folder, None)
        if options.baselines and options.method != "linear":
            results += _by_protocol(probe_options(options), task, folder / LINEAR, FeatureStore())
    return results


def probe_options(options: ExperimentOptions) -> ExperimentOptions:
    """Return the options of the linear probe beside an experiment: the same task, backbone, seeds and protocol."""
    fresh = {one.name: one.default for one in dataclasses.fields(ExperimentOptions)}
    kept = ("backbone", "checkpoint", "pretrained", "image_size", "task", "data", "root", "skip_broken", "shots",
            "shots_seed", "image_column", "label_column", "cache", "batch_size", "seed", "device", "dtype", "limit",
            "output", "overwrite", "resume", "protocol", "seeds")  # fmt: skip
    own = {"method": "linear", "epochs": LINEAR_EPOCHS, "lr": LINEAR_LR}
    own |= {"tune": LINEAR_TUNE if options.protocol else None}
    return ExperimentOptions(**{**fresh, **{name: getattr(options, name) for name in kept}, **own})


def _opened(options: ExperimentOptions) -> Path:
    """Open the folder; with ``--resume`` an experiment of the same options goes on."""
    folder = Path(options.output).expanduser()
    earlier: Any = None
    if options.resume and (folder / EXPERIMENT).is_file():
        with contextlib.suppress(ValueError):
            earlier = read_json(folder / EXPERIMENT)
        if not isinstance(earlier, dict):
            raise OutputError(f"{folder / EXPERIMENT} is damaged: choose another --output, or --overwrite")
        names = differing(earlier, plain(options))
        if names:
            flags = ", ".join("--" + name.replace("_", "-") for name in names)
            raise OutputError(
                f"{folder} was begun with other options ({flags}): give the same, or start again without --resume"
            )
    folder = claimed_output(folder, "experiment", options.overwrite, resume=earlier is not None)
    write_json(folder / EXPERIMENT, plain(options))
    return folder


def _by_protocol(
    options: ExperimentOptions, task: Task, folder: Path, features: FeatureStore | None
) -> list[RunResult]:
    parts = choosing_splits(task, few_shot=options.shots is not None) if options.protocol else None
    plan = Plan(features=features)
    changes: dict[str, Any] = {}
    if options.protocol == "validation" and parts is not None:
        choice = _chosen(options, task, folder, parts, features)
        changes, number = choice.changes, len(options.candidates())
        plan = Plan(
            protocol="validation",
            selection=f"best epoch of {_counted(number)} on {parts.origin}, seed {options.seed}",
            chosen={**choice.changes, "epoch": choice.epoch, "validation_score": choice.score},
            training=parts.whole,
            stop_after=choice.epoch,
            features=features,
        )
    elif options.protocol == "published" and parts is not None:
        tried = options.candidates()
        if len(tried) > 1:
            changes = _chosen(options, task, folder, parts, features).changes
        plan = Plan(
            protocol="published",
            selection=f"best epoch of {_counted(len(tried))} on the test split",
            chosen=changes,
            training=parts.whole,
            best_on_test=True,
            features=features,
        )
    results = []
    for number in range(options.number_of_runs()):
        seed = options.seed + number
        one = options.run(str(folder / f"seed-{seed}"), **changes, seed=seed)
        results.append(train(one, plan))
    return results


def _counted(candidates: int) -> str:
    return "the one candidate" if candidates == 1 else f"{candidates} candidates"


def _used(options: ExperimentOptions, split: datasets.Dataset) -> int:
    return min(len(split), options.limit or len(split))


def _chosen(
    options: ExperimentOptions, task: Task, folder: Path, parts: ChoosingSplits, features: FeatureStore | None
) -> Choice:
    """Judge every candidate, write down what was tried, and return the best."""
    on_test = options.protocol == "published"
    training, watched = (parts.whole, task.splits["test"]) if on_test else (parts.training, parts.validation)
    trials: list[Trial] = []
    for number, changes in enumerate(options.candidates()):
        one = options.run(str(folder / TRIALS / str(number)), **changes)
        trials.append(judged(one, task, changes, training, watched, options.patience, features))
    if not any(trial.scores for trial in trials):
        raise TrainingError("the training of every candidate diverged: lower --lr, or give other values to --tune")
    choice = choose(trials, task.higher_is_better)
    record = {
        "protocol": options.protocol,
        "chosen_on": "test" if on_test else parts.origin,
        "images": {
            "training": _used(options, training),
            "choosing": _used(options, watched),
            "training in the end": _used(options, parts.whole),
        },
        "seed": options.seed,
        "metric": task.metric,
        "chosen": choice,
        "trials": trials,
    }
    processes.on_main(lambda: write_json(folder / SELECTION, record))
    return choice
