"""A run exported: compared on real test images, timed in its own runtimes, scored where its values were rounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones.loading import preprocessing
from pyra.errors import ConfigError, did_you_mean
from pyra.export import FORMATS, ExportReport, export_model, load_exported
from pyra.files import write_json
from pyra.tasks.data.task import ImageDataset
from pyra.tasks.evaluation import data_for
from pyra.tasks.output import staged_output
from pyra.tasks.runs import run_at_rate, task_of_run
from pyra.tasks.scoring import predict, value_of
from pyra.tasks.timing import forward, take_turns

MEASURED = "measured.json"
_CALIBRATION = 64  # training images that ranges of activations are taken from
_BATCH = 32  # images a forward of the scoring


@dataclass(frozen=True)
class Subject:
    """A run ready to be exported in any format.

    Attributes:
        model: folded, in evaluation mode.
        test: the images of its test split.
        batch: [B, 3, S, S], the first of them, to compare and time with.
        calibration: [M, 3, S, S] training images.
        metric: of its task.
        metadata: what is stored with the model.
    """

    model: nn.Module
    test: ImageDataset
    batch: Tensor
    calibration: Tensor
    metric: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """What is measured of an export besides its comparison.

    Attributes:
        batch_size: images a forward.
        images_per_second: by runtime, and of the model in PyTorch; in turns within one run.
        metric: name of what ``value`` is.
        value: of the export on the test split; None where nothing was rounded.
        plain_value: of the model.
        scored: images of the test split.
    """

    batch_size: int
    images_per_second: dict[str, float]
    metric: str | None = None
    value: float | None = None
    plain_value: float | None = None
    scored: int | None = None


@dataclass(frozen=True)
class ExportedRun:
    """An exported run: where it lies, how it compares, what was measured of it."""

    folder: Path
    report: ExportReport
    measured: Measured


PYTORCH = "PyTorch model"
"""Under which name the speed of the model itself stands."""


def subject_of(run: str | Path, *, rate: float | None = None, images: int = 32) -> Subject:
    """Read a run folder and the images that its exports are compared on.

    Args:
        run: folder of the run.
        rate: share of the MACs to save; the run's own by default.
        images: test images to compare and time with.

    Raises:
        DataError, CheckpointError: where the run cannot be read.
        ConfigError: for a rate of a run that merges nothing, or a number of images that is none.
    """
    if images < 1:
        raise ConfigError(f"--images must be a positive number, got {images}")
    model, options, labels = run_at_rate(run, rate)
    prepared = preprocessing(model)
    task = task_of_run(run, options, labels)
    told = {"skip_broken": options.skip_broken, "cache": options.cache}
    test = data_for(model, task, "test", limit=options.limit, **told)
    train = data_for(model, task, "train", limit=_CALIBRATION, **told)
    metadata = {
        "labels": json.dumps(labels, ensure_ascii=False),
        "image_size": str(prepared.image_size),
        "mean": " ".join(map(str, prepared.mean)),
        "std": " ".join(map(str, prepared.std)),
        "interpolation": test.interpolation,
        "task": task.name,
        "backbone": options.backbone if options.backbone == "demo" else Path(options.backbone).name,
    }
    return Subject(model, test, _stacked(test, images), _stacked(train, _CALIBRATION), task.metric, metadata)


def _stacked(data: ImageDataset, most: int) -> Tensor:
    return torch.stack([data[i]["pixel_values"] for i in range(min(most, len(data)))])


def export_run(
    run: str | Path,
    folder: str | Path,
    *,
    format: str = "onnx",
    overwrite: bool = False,
    rate: float | None = None,
    images: int = 32,
    tolerance: float | None = None,
) -> ExportedRun:
    """Export a run folder to one format; see :func:`subject_of` and :func:`export_subject`."""
    subject = subject_of(run, rate=rate, images=images)
    return export_subject(subject, folder, format, overwrite=overwrite, tolerance=tolerance)


def export_subject(
    subject: Subject, folder: str | Path, format: str, *, overwrite: bool = False, tolerance: float | None = None
) -> ExportedRun:
    """Export, compare, time and, where values were rounded, score.

    Raises:
        OutputError: where ``folder`` holds an export and ``overwrite`` is false, or something else.
        ConfigError: where the format is unknown or a library is missing.
        ExportError: where the reloaded model differs; an earlier export stays.
    """
    with staged_output(folder, "export", overwrite) as staging:
        report = export_model(
            subject.model,
            staging,
            format,
            example_input=subject.batch,
            tolerance=tolerance,
            metadata=subject.metadata,
            calibration=subject.calibration,
        )
        measured = _measure(subject, staging, report)
        write_json(staging / MEASURED, asdict(measured))
    return ExportedRun(Path(folder), report, measured)


def _measure(subject: Subject, folder: Path, report: ExportReport) -> Measured:
    runtimes = [comparison.runtime for comparison in report.comparisons]
    opened = {name: load_exported(folder, runtime=name, trust_code=True) for name in runtimes}  # made a moment ago
    jobs = {name: (lambda run=run: run(subject.batch)) for name, run in opened.items()}
    seconds = take_turns({PYTORCH: forward(subject.model, subject.batch), **jobs}, rounds=5)
    speeds = {name: len(subject.batch) / value for name, value in seconds.items()}
    if not FORMATS[report.format].rounds:
        return Measured(len(subject.batch), speeds)
    exported, plain = (_score(subject, model) for model in (opened[runtimes[0]], subject.model))
    return Measured(len(subject.batch), speeds, subject.metric, exported, plain, len(subject.test))


def _score(subject: Subject, model: Any) -> float:
    predictions, labels = predict(model, subject.test, batch_size=_BATCH, description="scoring")
    return value_of(predictions, labels, subject.metric)


def check_formats(names: Sequence[str], rates: Sequence[float] | None) -> None:
    """Refuse what cannot be exported before anything is read.

    Raises:
        ConfigError: unknown or repeated formats or rates, a missing library (names the extra).
    """
    from pyra.export.formats import format_named

    if not names:
        raise ConfigError(f"--format is empty: give one or more of {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            close = did_you_mean(name, FORMATS)
            raise ConfigError(f"unknown --format {name!r}{close}; there is {', '.join(FORMATS)}")
        format_named(name)
    for flag, values in (("--format", list(names)), ("--rate", list(rates or []))):
        if len(set(values)) < len(values):
            raise ConfigError(f"{flag} names something twice: {', '.join(map(str, values))}")
