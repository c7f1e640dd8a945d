"""Scoring: what is deployed (adapter folded, tokens merged) is what is scored and timed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import macs, unwrap, wrapped_schedule
from pyra.backbones.loading import preprocessing
from pyra.errors import ConfigError
from pyra.files import write_json
from pyra.tasks.data.task import ImageDataset, Task, image_dataset
from pyra.tasks.provenance import scored
from pyra.tasks.results import RunResult, environment, evaluation_file, predictions_file, read_result
from pyra.tasks.runs import DTYPES, resolve_device, run_at_rate, task_of_run
from pyra.tasks.scoring import predict, value_of
from pyra.tasks.timing import throughput
from pyra.tasks.usage import Meter


@dataclass(frozen=True)
class Measured:
    """Speed and cost of a model beside the same backbone without merging (one run, same batch)."""

    images_per_second: float
    speedup: float
    macs: int
    plain_macs: int
    schedule: list[int]

    @property
    def rate(self) -> float:
        """Share of the MACs saved."""
        return 1 - self.macs / self.plain_macs

    def columns(self) -> dict[str, Any]:
        """Return the values as columns of a :class:`~pyra.tasks.results.RunResult`."""
        return {**dataclasses.asdict(self), "rate": self.rate}


def data_for(
    model: nn.Module,
    task: Task,
    split: str,
    *,
    skip_broken: bool = False,
    limit: int | None = None,
    cache: bool = True,
) -> ImageDataset:
    """Decode a split the way ``model`` was pretrained to see images, or find it decoded in the cache."""
    prepared = preprocessing(model)
    return image_dataset(
        task,
        split,
        image_size=prepared.image_size,
        mean=prepared.mean,
        std=prepared.std,
        skip_broken=skip_broken,
        limit=limit,
        cache=cache,
    )


def measure(model: nn.Module, images: Tensor, rounds: int = 7) -> Measured:
    """Time a folded model against its own unwrapped copy, in turns.

    Args:
        model: a backbone without PEFT layers, wrapped or not.
        images: [B, 3, S, S] on the model's device.
        rounds: timed forwards of each.
    """
    plain = unwrap(copy.deepcopy(model))
    speeds = throughput({"plain": plain, "model": model}, images, rounds=rounds)
    plain_macs = macs(plain)
    schedule = wrapped_schedule(model) or [0] * len(model.blocks)  # type: ignore[arg-type]
    return Measured(
        images_per_second=speeds["model"],
        speedup=speeds["model"] / speeds["plain"] if any(schedule) else 1.0,
        macs=macs(model),
        plain_macs=plain_macs,
        schedule=schedule,
    )


def evaluate_run(
    folder: str | Path,
    *,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "auto",
    skip_broken: bool = False,
    rate: float | None = None,
) -> RunResult:
    """Score and time a run folder again, with the data and weights it names.

    Writes :func:`~pyra.tasks.results.evaluation_file` and its answers into the folder.

    Args:
        folder: of the run.
        split: of its task.
        batch_size: images a forward; the run's own by default.
        device: ``auto``, ``cpu`` or ``cuda``.
        skip_broken: leave unreadable images out.
        rate: share of the MACs to save; the run's own by default.

    Raises:
        ConfigError: for a batch size or device that cannot be used.
        DataError, CheckpointError: where the run, its data or its backbone cannot be read.
    """
    folder = Path(folder)
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size must be a positive number, got {batch_size}")
    target = resolve_device(device)
    meter = Meter(target).start()
    model, options, labels = run_at_rate(folder, rate)
    trained = read_result(folder)
    task = task_of_run(folder, options, labels)
    data = data_for(
        model,
        task,
        split,
        skip_broken=skip_broken or options.skip_broken,
        limit=options.limit,
        cache=options.cache,
    )
    model = model.to(target)
    batch_size = batch_size or options.batch_size
    predictions, truth = predict(model, data, batch_size=batch_size, device=target, dtype=DTYPES[options.dtype])
    batch = torch.stack([data[i]["pixel_values"] for i in range(min(batch_size, len(data)))])
    measured = measure(model, batch.to(target))
    columns = scored(task, task.splits["train"]["label"][:], data)
    if columns["test_sha256"] == trained.test_sha256:  # its training images may have been some of the split only
        columns["majority_value"] = trained.majority_value
    result = dataclasses.replace(
        trained,
        value=value_of(predictions, truth, task.metric),
        **measured.columns(),
        throughput_batch_size=len(batch),
        num_test=len(data),
        skipped_images=len(data.broken),
        split=split,
        environment=environment(str(target)),
        **columns,
        **meter.stop().columns(),
    )
    file = folder / evaluation_file(split, rate)
    write_json(predictions_file(file), answers(result, predictions, truth))
    write_json(file, result)
    return result


def answers(result: RunResult, predictions: list[int], labels: list[int]) -> dict[str, Any]:
    """Return what is kept of the answers that a result was counted from: the images they are of, and class indices."""
    return {"split": result.split, "sha256": result.test_sha256, "predictions": predictions, "labels": labels}


def caution(result: RunResult) -> str | None:
    """Say what an evaluation is not good for, or None."""
    if result.protocol != "validation" or result.split == "test":
        return None
    return (
        f"note: images outside the test split chose the settings of this run, and most trained it: its score on "
        f"{result.split} is no estimate for new images"
    )
