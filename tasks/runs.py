"""From options to a model, and from a run folder back to it.

run/
result.json     the result (pyra.tasks.results)
predictions.json  what it answered on each test image
training.json   its losses, step by step
options.json    the options it was made with, paths absolute
data.json       the splits it was trained and scored on
backbone.json   which weights it was made from, where they came from a file
labels.json     the class names
adapter/        what was trained (pyra.adapters.folder)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyra.adapters import adapt, fold_adapter, load_adapter
from pyra.adapters.methods import refuse_rank
from pyra.backbones import geometry, set_rate, wrapped_config
from pyra.backbones.loading import create_backbone, weights_file
from pyra.checkpoints import file_digest
from pyra.errors import CheckpointError, ConfigError, DataError
from pyra.files import read_json, write_json
from pyra.records import record_problems
from pyra.tasks.data.columns import Columns
from pyra.tasks.data.fewshot import few_shot
from pyra.tasks.data.task import Task, load_task, split_digest
from pyra.tasks.options import DEVICES, RunOptions
from pyra.tasks.output import unfinished
from pyra.tasks.provenance import remember_weights
from pyra.tasks.results import RESULT_FILE

DEMO_BACKBONE = Path(__file__).parent / "demo" / "backbone"
ADAPTER = "adapter"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS, DATA = "options.json", "data.json"
_LABELS, _BACKBONE = "labels.json", "backbone.json"


def resolve_device(name: str) -> torch.device:
    """Turn auto / cpu / cuda into a device; raises :class:`ConfigError` for a device that is not there."""
    if name in ("auto", "cuda") and torch.cuda.is_available():  # each process of a distributed run has its own
        return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda")
    if name == "auto":
        return torch.device("cpu")
    if re.fullmatch(DEVICES, name) is None:
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def new_backbone(options: RunOptions, num_classes: int) -> nn.Module:
    """Create the pretrained backbone of a run with a new head."""
    name = str(DEMO_BACKBONE) if options.backbone == "demo" else options.backbone
    return create_backbone(
        name,
        num_classes=num_classes,
        image_size=options.image_size,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        drop_path_rate=0.0 if options.method == "linear" else options.drop_path,
    )


def new_model(options: RunOptions, num_classes: int) -> nn.Module:
    """Create the backbone and adapt it as the options say.

    Raises:
        UnsupportedModelError: also for methods that merge nothing, because every run reports its cost.
    """
    model = new_backbone(options, num_classes)
    geometry(model)
    remember_weights(model, options.pretrained or options.checkpoint is not None)
    if options.method == "full":
        return model
    if options.peft_method is not None:
        refuse_rank(options.peft_method, options.rank, int(getattr(model, "num_features", options.rank)))
    return adapt(model, pyra=options.pyra_config(), peft=options.peft_config())


def save_run(folder: Path, options: RunOptions, task: Task) -> None:
    """Write what is needed to make the model again (the adapter itself is saved beside it), and on what it was made."""
    write_json(folder / DATA, data_record(task))
    weights = _weights_file(options)
    if weights is not None:
        write_json(folder / _BACKBONE, {"file": str(weights), "sha256": file_digest(weights)})
    write_json(folder / OPTIONS, stored_options(options))
    write_json(folder / _LABELS, list(task.labels))


def stored_options(options: RunOptions) -> dict[str, Any]:
    """Return the options as a run keeps them: a run is read from any folder, so paths are absolute."""
    values = asdict(options)
    for name in ("backbone", "checkpoint", "data", "root"):
        shipped = name == "backbone" and options.backbone == "demo"  # though a folder may be called so
        if values[name] is not None and not shipped and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    return values


def task_for(options: RunOptions) -> Task:
    """Load the task that a run trains and is scored on: every run gets its task here.

    Raises:
        DataError: where the task cannot be loaded, or has too few images of a class for ``--shots``.
    """
    columns = Columns(options.image_column, options.label_column)
    task = load_task(options.task, options.data, options.root, columns)
    return task if options.shots is None else few_shot(task, options.shots, options.shots_seed)


def task_of_run(folder: str | Path, options: RunOptions, labels: Sequence[str]) -> Task:
    """Load the task of a run.

    Raises:
        DataError: where its classes, its version or the images of a split are not those of the run any more: scores
            would not be those of what was trained, and training images could be among the test images.
    """
    folder = Path(folder)
    task = task_for(options)
    if list(task.labels) != list(labels):
        raise DataError(f"{folder} was trained on other classes than {task.name} has now: the data or the run changed")
    if not (folder / DATA).is_file():  # of an earlier version
        return task
    stored, now = _read_json(folder, DATA), data_record(task)
    if not isinstance(stored, dict) or not isinstance(stored.get("splits"), dict):
        raise DataError(f"{folder / DATA} holds no record of splits")
    was, here = stored.get("version"), now["version"]
    if was != here:
        raise DataError(
            f"{folder} was trained on version {was} of {task.name}, here is version {here}: their scores cannot be "
            "compared; train again"
        )
    changed = [split for split, record in stored["splits"].items() if now["splits"].get(split) != record]
    if changed:
        then, found = (record["splits"].get(changed[0], {}).get("images", 0) for record in (stored, now))
        raise DataError(
            f"the {changed[0]} split of {task.name} is not the one {folder} was made with ({then} images then, {found} "
            "now): put the data back, or train again"
        )
    return task


def data_record(task: Task) -> dict[str, Any]:
    """Return what is recorded of the data of a task: its version, and size and hash of each split."""
    splits = {name: {"images": len(rows), "sha256": split_digest(rows)} for name, rows in task.splits.items()}
    return {"task": task.name, "version": task.version, "splits": splits}


def _weights_file(options: RunOptions) -> Path | None:
    if options.checkpoint is not None:
        return Path(options.checkpoint).resolve()
    folder = DEMO_BACKBONE if options.backbone == "demo" else Path(options.backbone)
    return weights_file(folder).resolve() if options.pretrained and folder.is_dir() else None


def load_run(folder: str | Path) -> tuple[nn.Module, RunOptions, list[str]]:
    """Read a run folder.

    Returns:
        The trained model with its PEFT layers folded, in evaluation mode on the CPU; its options; its class names.

    Raises:
        DataError: where the folder holds no finished run.
        CheckpointError: where the backbone's weights have changed, or the adapter does not fit them.
    """
    folder = Path(folder)
    options = _read_options(folder)
    _check_same_weights(folder, options)
    labels = _read_json(folder, _LABELS)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{folder / _LABELS} holds no list of class names")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # the random weights of --no-pretrained, once more
        backbone = new_backbone(options, len(labels))
    model = load_adapter(backbone, folder / ADAPTER)
    return fold_adapter(model).eval().requires_grad_(False), options, labels


def run_at_rate(folder: str | Path, rate: float | None) -> tuple[nn.Module, RunOptions, list[str]]:
    """Read a run folder as :func:`load_run` does, and set its model's rate where one is given.

    Raises:
        ConfigError: for a rate of a run that merges nothing, or one that cannot be had.
    """
    model, options, labels = load_run(folder)
    if rate is not None:
        if wrapped_config(model) is None:
            raise ConfigError(
                f"--rate {rate}: {folder} was trained with --method {options.method}, which merges nothing"
            )
        set_rate(model, rate)
    return model, options, labels


def _check_same_weights(folder: Path, options: RunOptions) -> None:
    weights = _weights_file(options)
    if weights is None or not (folder / _BACKBONE).is_file():
        return
    stored = _read_json(folder, _BACKBONE)
    expected = stored.get("sha256") if isinstance(stored, dict) else None
    if weights.is_file() and file_digest(weights) != expected:
        raise CheckpointError(f"{weights} is not what {folder} was trained on: its weights have changed since")


def _read_options(folder: Path) -> RunOptions:
    values = _read_json(folder, OPTIONS)
    if isinstance(values, dict) and values.get("kind") == "language":
        raise DataError(f"{folder} is a run on a language task: pyra evaluate takes it, what is about images does not")
    if isinstance(values, dict) and isinstance(values.get("kind"), str):
        raise DataError(f"{folder} is a run of pyra {values['kind']}: what is about images does not take it")
    problems = record_problems(RunOptions, values)
    if problems:
        raise DataError(f"{folder / OPTIONS} holds no options of a run: {'; '.join(problems)}")
    try:
        return RunOptions(**values)
    except ConfigError as error:
        raise DataError(f"{folder / OPTIONS}: {error}") from None


def _read_json(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except FileNotFoundError:
        raise DataError(no_run(folder, name)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from None


def no_run(folder: Path, name: str) -> str:
    """Say what a folder holds in which a file of a run is missing: an experiment, an interrupted run, or nothing."""
    if (folder / "experiment.json").is_file():
        runs = sorted(entry.parent.name for entry in folder.glob(f"seed-*/{RESULT_FILE}"))
        named = f"name a run of it, {', '.join(runs)}" if runs else "no run of it is finished, --resume goes on with it"
        return f"{folder} holds an experiment: {named}"
    if left := unfinished(folder, "run"):
        return f"{folder} holds no finished run: {left[0]} is interrupted, and the same training with --resume goes on"
    if (folder / "export.json").is_file():
        return f"{folder} is an export, not a run: name the folder of the run that it was made of"
    return f"{folder} holds no finished run ({name} is missing); make one with `pyra train`"
