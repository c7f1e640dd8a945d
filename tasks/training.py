"""From options to a finished run folder: train, score once, time, and write it down."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from pyra.adapters import CardInfo, fold_adapter, save_adapter
from pyra.adapters.card import Described
from pyra.adapters.folder import CARD, WEIGHTS
from pyra.backbones import set_rate
from pyra.backbones.loading import preprocessing
from pyra.errors import OutputError, TrainingError
from pyra.files import write_json, write_text
from pyra.tasks.data.duplicates import shared_content
from pyra.tasks.data.task import ImageDataset, Task
from pyra.tasks.evaluation import answers, data_for, measure
from pyra.tasks.fitting import checkpoints, processes
from pyra.tasks.fitting.fit import Watch, check_trackers, fit, forget_checkpoints
from pyra.tasks.fitting.loop import LoopOptions
from pyra.tasks.options import RunOptions
from pyra.tasks.probing import FeatureStore, probe_of
from pyra.tasks.provenance import provenance
from pyra.tasks.results import PREDICTIONS_FILE, RESULT_FILE, RunResult, environment, read_result
from pyra.tasks.resuming import finished, shared_output
from pyra.tasks.runs import ADAPTER, DTYPES, new_model, resolve_device, save_run, task_for
from pyra.tasks.scoring import predict, value_of
from pyra.tasks.shelf import Shelf
from pyra.tasks.usage import Meter

TRAINING = "training.json"


@dataclass(frozen=True)
class Plan:
    """Where a run stands in a protocol.

    Attributes:
        protocol: its name.
        selection: the rule by which hyper-parameters and epoch are chosen, in words.
        chosen: what was chosen before.
        training: the images to train on; the training split by default.
        stop_after: end after so many epochs of the options' schedule.
        best_on_test: score the test split after every epoch and keep the best: the habit that flatters.
        features: of a probe's images, where an experiment keeps them.
        shelf: keeps task and decoded images for the next run of this process.
    """

    protocol: str = "fixed"
    selection: str = "none: the last epoch of the given options"
    chosen: dict[str, Any] | None = None
    training: datasets.Dataset | None = None
    stop_after: float | None = None
    best_on_test: bool = False
    features: FeatureStore | None = None
    shelf: Shelf | None = None


def train(options: RunOptions, plan: Plan | None = None) -> RunResult:
    """Train, score and time one run, and write its folder.

    All that can be wrong with the input is found before the output folder is touched, and an earlier run there is
    replaced when the new one is complete. Without a plan the last epoch of the given options counts.
    With ``options.resume`` an interrupted run goes on from its newest complete
    checkpoint, and a finished one is left as it is. In a distributed run every process calls this and gets the result.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    plan = plan or Plan()
    device = ready(options)
    refuse_output_in_data(options)
    shelf = plan.shelf if plan.shelf is not None and plan.training is None else Shelf()
    task = shelf.get(("task", *data_options(options)), functools.partial(_looked_through, options))
    if options.resume:
        earlier = processes.on_main(lambda: finished(options, task))
        if earlier is not None:
            return earlier
    model = new_model(options, len(task.labels))
    with shared_output(options, task) as folder:
        if (folder / RESULT_FILE).exists():  # the process was killed between its last file and the swap
            return read_result(folder)
        seen = (*data_options(options), preprocessing(model), options.skip_broken, options.limit)
        make = functools.partial(splits, options, task, model, plan.training)
        train_data, test_data = shelf.get(("splits", *seen), make)
        return run(options, task, model, train_data, test_data, folder, device, plan)


def data_options(options: RunOptions) -> tuple[Any, ...]:
    """Return what decides which task a run has: runs with the same have the same."""
    names = ("task", "data", "root", "image_column", "label_column", "shots", "shots_seed")
    return tuple(getattr(options, name) for name in names)


def ready(options: LoopOptions) -> torch.device:
    """Check what a training needs around it, meet the other processes, seed, and return the device.

    Raises:
        ConfigError: for a device or a tracker that is not there, or a batch that does not divide.
    """
    device = resolve_device(options.device)
    check_trackers(options.track)
    processes.batch_of_each(options.batch_size, options.accumulate)
    processes.join(device)
    set_seed(options.seed)
    return device


class Placed(Protocol):
    """Options that say where data (``data``, and ``root`` where they have one) and output lie."""

    output: str


def refuse_output_in_data(options: Placed) -> None:
    """Raise :class:`OutputError` where data lies inside the output, or the output among the images.

    It would be read as a class next time.
    """
    try:
        output = Path(options.output).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        reason = " ".join(str(error).split())
        raise OutputError(f"cannot write to {options.output}: {reason}; choose another --output") from None
    for flag, given in ((f"--{name}", getattr(options, name, None)) for name in ("data", "root")):
        place = None if given is None else Path(given).expanduser().resolve()
        if place is None:
            continue
        if flag == "--data" and output.is_relative_to(place):
            raise OutputError(f"--output {options.output} lies inside {flag} {given}: choose a folder outside")
        if place.is_relative_to(output):
            raise OutputError(f"{flag} {given} is --output {options.output} or inside it: choose another --output")


def _looked_through(options: RunOptions) -> Task:
    task = task_for(options)
    warn_of_shared(options, task)
    return task


def warn_of_shared(options: RunOptions, task: Task) -> None:
    """Warn, once, where test images of data of one's own are training images, too."""
    text = shared_content(task.splits) if options.data is not None and processes.is_main() else None
    if text is not None:
        warnings.warn(text, stacklevel=1)


def splits(
    options: RunOptions, task: Task, model: nn.Module, training: datasets.Dataset | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Decode the train and test split of a task for a model; ``training`` takes the place of the former."""
    trained = task if training is None else dataclasses.replace(task, splits={**task.splits, "train": training})
    return decode(options, trained, model, "train"), decode(options, task, model, "test")


def decode(options: RunOptions, task: Task, model: nn.Module, split: str) -> ImageDataset:
    """Decode a split of a task for a model, as the options say."""
    return data_for(model, task, split, skip_broken=options.skip_broken, limit=options.limit, cache=options.cache)


def run(
    options: RunOptions,
    task: Task,
    model: nn.Module,
    train_data: ImageDataset,
    test_data: ImageDataset,
    folder: Path,
    device: torch.device,
    plan: Plan | None = None,
) -> RunResult:
    """Train a model made by :func:`pyra.tasks.runs.new_model`, save it, then score and time what was saved."""
    plan = plan or Plan()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes.on_main(lambda: save_run(folder, options, task))
    meter = Meter(device).start()
    try:
        flattered = Watch(test_data, task.metric, task.higher_is_better, keep_best=True) if plan.best_on_test else None
        more: dict[str, Any] = {"watch": flattered, "stop_after": plan.stop_after, "store": plan.features}
        fitted = fit(model, train_data, options, folder, device, **more)
    except TrainingError:  # its checkpoints lead to the same end
        processes.on_main(lambda: forget_checkpoints(folder))
        raise
    model = _in_one_piece(model, options, task).cpu().eval()
    info = card_info(options.backbone, task.name)
    described = processes.on_main(lambda: save_trained(model, folder, info))
    folded = fold_adapter(model).to(device).eval()
    predictions, labels = _answers(folded, test_data, options, device, plan.features)
    batch = torch.stack([test_data[i]["pixel_values"] for i in range(min(options.batch_size, len(test_data)))])

    chosen = plan.chosen
    if fitted.kept is not None:  # by the test split, as the rule of the plan says
        chosen = {**(chosen or {}), "epoch": fitted.kept[0], "test_score": fitted.kept[1]}

    def finish() -> RunResult:
        result = RunResult(
            task=task.name,
            method=options.label,
            metric=task.metric,
            value=value_of(predictions, labels, task.metric),
            trained_parameters=trained,
            seed=options.seed,
            backbone=options.backbone,
            image_size=test_data.image_size,
            batch_size=options.batch_size,
            throughput_batch_size=len(batch),
            epochs=options.epochs,
            train_seconds=fitted.seconds,
            num_test=len(test_data),
            skipped_images=len(train_data.broken) + len(test_data.broken),
            protocol=plan.protocol,
            selection=plan.selection,
            chosen=chosen,
            environment=environment(str(device)),
            **provenance(options, task, model, train_data, test_data),
            **meter.stop().columns(),
            **measure(folded, batch.to(device)).columns(),
        )
        write_json(folder / TRAINING, {"losses": fitted.losses, "scores": fitted.scores})
        write_json(folder / PREDICTIONS_FILE, answers(result, predictions, labels))
        write_card(folder, described, info, result)
        write_json(folder / RESULT_FILE, result)
        forget_checkpoints(folder)
        return result

    return processes.on_main(finish)


def _in_one_piece(model: nn.Module, options: RunOptions, task: Task) -> nn.Module:
    """Return a model that holds all of its weights: one whose layers are sharded stays so, and is made anew."""
    if not checkpoints.is_sharded(model):
        return model
    trained = checkpoints.trained_tensors(model)
    set_seed(options.seed)  # as before: what starts at random is the same
    fresh = new_model(options, len(task.labels))
    checkpoints.put_back(fresh, trained)
    if options.elastic:
        set_rate(fresh, options.rates()[-1])
    return fresh


def _answers(
    folded: nn.Module, data: ImageDataset, options: RunOptions, device: torch.device, store: FeatureStore | None
) -> tuple[list[int], list[int]]:
    """What the finished model says of every image; a probe of an experiment goes on from stored features."""
    model: nn.Module = folded
    examples: Dataset[dict[str, Any]] = data
    dtype = DTYPES[options.dtype]
    head = probe_of(folded) if options.method == "linear" and store is not None else None
    if head is not None and store is not None:
        model = head
        examples = store.features(folded, data, batch_size=options.batch_size, device=device, dtype=dtype)
    said = f"{options.label}: test"
    return predict(model, examples, batch_size=options.batch_size, device=device, dtype=dtype, description=said)


def card_info(backbone: str, task: str) -> CardInfo:
    """Return what the model card of a run says before there is a score; no path of this machine."""
    place = Path(backbone).expanduser()
    name = "the demo backbone of pyra" if backbone == "demo" else place.resolve().name if place.exists() else backbone
    return CardInfo(backbone=name, task=task)


def save_trained(model: nn.Module, folder: Path, info: CardInfo) -> Described:
    """Save the adapter of a run; returns what its card says of the model, which is folded next."""
    save_adapter(model, folder / ADAPTER, info)
    with safe_open(folder / ADAPTER / WEIGHTS, "pt") as file:
        weights = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return Described.of(model, weights)


def write_card(folder: Path, described: Described, info: CardInfo, result: RunResult) -> None:
    """Write the model card of a run once more, with its score."""
    scored = dataclasses.replace(info, metric=result.metric, value=result.value)
    write_text(folder / ADAPTER / CARD, described.card(scored))
