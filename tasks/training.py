"""From options to a finished run folder: train, score once, time, and write it down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from pyra.adapters import fold_adapter, save_adapter
from pyra.errors import OutputError, TrainingError
from pyra.files import write_json
from pyra.tasks.data import ImageDataset, Task
from pyra.tasks.evaluation import data_for, measure
from pyra.tasks.fitting import processes
from pyra.tasks.fitting.fit import check_trackers, fit, forget_checkpoints
from pyra.tasks.options import RunOptions
from pyra.tasks.output import staged_output
from pyra.tasks.provenance import provenance
from pyra.tasks.results import RESULT_FILE, RunResult, environment, read_result
from pyra.tasks.resuming import finished, interrupted
from pyra.tasks.runs import ADAPTER, DTYPES, new_model, resolve_device, save_run, task_for
from pyra.tasks.scoring import predict, value_of
from pyra.tasks.usage import Meter

PROTOCOL, SELECTION = "fixed", "none: the last epoch of the given options"
PREDICTIONS, TRAINING = "predictions.json", "training.json"


def train(options: RunOptions) -> RunResult:
    """Train, score and time one run, and write its folder.

    All that can be wrong with the input is found before the output folder is touched, and an earlier run there is
    replaced when the new one is complete. With ``options.resume`` an interrupted run goes on from its newest complete
    checkpoint, and a finished one is left as it is. In a distributed run every process calls this and gets the result.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    device = resolve_device(options.device)
    check_trackers(options.track)
    processes.batch_of_each(options.batch_size, options.accumulate)
    processes.join(device)
    set_seed(options.seed)
    task = task_for(options)
    _refuse_output_in_data(options)
    if options.resume:
        earlier = processes.on_main(lambda: finished(options))
        if earlier is not None:
            return earlier
    model = new_model(options, len(task.labels))
    with _shared_output(options, task) as folder:
        if (folder / RESULT_FILE).exists():  # the process was killed between its last file and the swap
            return read_result(folder)
        train_data, test_data = splits(options, task, model)
        return run(options, task, model, train_data, test_data, folder, device)


@contextmanager
def _shared_output(options: RunOptions, task: Task) -> Iterator[Path]:
    """The folder that the main process opens and ends, known to every process."""
    with ExitStack() as stack:

        def enter() -> Path:
            resumed = interrupted(options, task) if options.resume else None
            return stack.enter_context(staged_output(options.output, "run", options.overwrite, resumed))

        folder = processes.on_main(enter)
        yield folder
        processes.wait()
        processes.on_main(stack.close)


def _refuse_output_in_data(options: RunOptions) -> None:
    """A run written among the images would be read as a class next time."""
    if options.data is None:
        return
    data, output = Path(options.data).expanduser().resolve(), Path(options.output).expanduser().resolve()
    if output.is_relative_to(data):
        raise OutputError(f"--output {options.output} lies inside --data {options.data}: choose a folder outside")


def splits(options: RunOptions, task: Task, model: nn.Module) -> tuple[ImageDataset, ImageDataset]:
    """Decode the train and test split of a task for a model."""
    train_data, test_data = (
        data_for(model, task, split, skip_broken=options.skip_broken, limit=options.limit, cache=options.cache)
        for split in ("train", "test")
    )
    return train_data, test_data


def run(
    options: RunOptions,
    task: Task,
    model: nn.Module,
    train_data: ImageDataset,
    test_data: ImageDataset,
    folder: Path,
    device: torch.device,
) -> RunResult:
    """Train a model made by :func:`pyra.tasks.runs.new_model`, save it, then score and time what was saved."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes.on_main(lambda: save_run(folder, options, task))
    meter = Meter(device).start()
    try:
        fitted = fit(model, train_data, options, folder, device)
    except TrainingError:  # its checkpoints lead to the same end
        processes.on_main(lambda: forget_checkpoints(folder))
        raise
    model.cpu().eval()
    processes.on_main(lambda: _save_trained(model, folder))
    folded = fold_adapter(model).to(device).eval()
    predictions, labels = predict(
        folded,
        test_data,
        batch_size=options.batch_size,
        device=device,
        dtype=DTYPES[options.dtype],
        description=f"{options.label}: test",
    )
    batch = torch.stack([test_data[i]["pixel_values"] for i in range(min(options.batch_size, len(test_data)))])

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
            protocol=PROTOCOL,
            selection=SELECTION,
            environment=environment(str(device)),
            **provenance(options, task, model, train_data, test_data),
            **meter.stop().columns(),
            **measure(folded, batch.to(device)).columns(),
        )
        write_json(folder / TRAINING, {"losses": fitted.losses, "scores": fitted.scores})
        answers = {"split": "test", "sha256": result.test_sha256, "predictions": predictions, "labels": labels}
        write_json(folder / PREDICTIONS, answers)
        write_json(folder / RESULT_FILE, result)
        forget_checkpoints(folder)
        return result

    return processes.on_main(finish)


def _save_trained(model: nn.Module, folder: Path) -> None:
    save_adapter(model, folder / ADAPTER)
