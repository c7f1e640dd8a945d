"""A trained model for images of one's own: a run folder, or an export, opened as a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyra.errors import ConfigError, DataError
from pyra.export.record import RECORD
from pyra.tasks.classifier import Classifier
from pyra.tasks.runs import DTYPES, OPTIONS, load_run, resolve_device

__all__ = ["RUN", "Classifier", "open_classifier"]

RUN = "run"
"""The format of a classifier that was opened from a run folder; those of exports are in ``pyra.export.FORMATS``."""

_METADATA = ("labels", "image_size", "mean", "std")


def open_classifier(
    folder: str | Path,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    device: str = "auto",
    trust_code: bool = False,
) -> Classifier:
    """Open a folder that ``pyra train`` or ``pyra export`` wrote; its model answers once before it is returned.

    Args:
        folder: of a run (its PEFT layers are folded, its tokens merge) or of an export.
        runtime: that opens the export; the first that is installed by default. A run has ``pytorch`` only.
        threads: of the runtime.
        device: for a run: ``auto``, ``cpu``, ``cuda`` or ``cuda:NUMBER``. Exports run on the CPU.
        trust_code: open an export that is machine code, see :func:`pyra.export.load_exported`.

    Raises:
        DataError: where there is no such folder, no finished run in it, or an export that does not say how its images
            are prepared; where the model has another number of classes than names.
        ConfigError: for a runtime, a device or a number of threads that cannot be used.
        ExportError, CheckpointError: for damaged files.
        TrainingError: where the model gives logits that are NaN or infinite.
    """
    folder = Path(folder).expanduser()
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be a positive number, got {threads}")
    if not folder.is_dir():
        said = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {said}: give the folder of a run (pyra train) or of an export (pyra export)")
    if (folder / RECORD).is_file():
        classifier = _open_export(folder, runtime, threads, device, trust_code)
    else:
        _refuse_several(folder)
        classifier = _open_run(folder, runtime, threads, device)
    side, classes = classifier.image_size, len(classifier.labels)
    answer = classifier.probabilities(torch.zeros(1, 3, side, side, dtype=torch.uint8))  # the first one may take long
    if answer.shape != (1, classes):
        raise DataError(f"{folder}: the model answers {list(answer.shape)} to one image, and has {classes} class names")
    return classifier


def _refuse_several(folder: Path) -> None:
    if (folder / OPTIONS).is_file():  # a run may have its exports below it
        return
    exports = sorted(str(entry.parent) for depth in ("*", "*/*") for entry in folder.glob(f"{depth}/{RECORD}"))
    if exports:
        raise DataError(f"{folder} is no export itself, but holds some: name one, {', '.join(exports)}")


def _open_run(folder: Path, runtime: str | None, threads: int | None, device: str) -> Classifier:
    from pyra.backbones.loading import preprocessing

    if runtime not in (None, "pytorch"):
        raise ConfigError(f"--runtime {runtime}: a run opens in pytorch only; export it first, with `pyra export`")
    target = resolve_device(device)
    model, options, labels = load_run(folder)
    prepared = preprocessing(model)
    model = model.to(target)
    dtype = DTYPES[options.dtype]
    if threads is not None:
        torch.set_num_threads(threads)

    def run(pixel_values: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = model(pixel_values.to(target))
            return logits.float().cpu()

    return Classifier(
        labels=tuple(labels),
        image_size=prepared.image_size,
        mean=prepared.mean,
        std=prepared.std,
        format=RUN,
        runtime="pytorch",
        run=run,
        task=Path(options.data or options.task or "").name,
        backbone=Path(options.backbone).name,
    )


def _open_export(folder: Path, runtime: str | None, threads: int | None, device: str, trust_code: bool) -> Classifier:
    import pyra.export

    if device not in ("auto", "cpu"):
        raise ConfigError(f"--device {device}: an export runs on the CPU; for a GPU name its run folder instead")
    opened = pyra.export.load_exported(folder, runtime=runtime, threads=threads, trust_code=trust_code)
    metadata = opened.metadata
    missing = [name for name in _METADATA if name not in metadata]
    if missing:
        raise DataError(
            f"{folder / RECORD}: its metadata has no {', '.join(missing)}, so nothing says how images are prepared; "
            "write it with `pyra export`, or give export_model(metadata=...) these"
        )
    return Classifier(
        labels=_labels(folder, metadata["labels"]),
        image_size=_image_size(folder, metadata["image_size"]),
        mean=_three(folder, metadata, "mean", above=-math.inf),
        std=_three(folder, metadata, "std", above=0),
        format=opened.format,
        runtime=opened.runtime,
        run=opened,
        task=metadata.get("task", ""),
        backbone=Path(metadata.get("backbone", "")).name,
    )


def _labels(folder: Path, text: str) -> tuple[str, ...]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise _odd(folder, "labels", text, "a JSON list of class names")
    return tuple(labels)


def _image_size(folder: Path, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 10_000):
        raise _odd(folder, "image_size", text, "a number of pixels")
    return int(text)


def _three(folder: Path, metadata: Mapping[str, str], name: str, above: float) -> tuple[float, ...]:
    try:
        values: Sequence[float] = [float(part) for part in metadata[name].split()]
    except ValueError:
        values = []
    if len(values) != 3 or not all(math.isfinite(value) and value > above for value in values):
        positive = " above 0" if above == 0 else ""
        raise _odd(folder, name, metadata[name], f"three numbers{positive}, separated by spaces")
    return tuple(values)


def _odd(folder: Path, name: str, text: str, expected: str) -> DataError:
    return DataError(f"{folder / RECORD}: {name} in its metadata is {text[:60]!r}, not {expected}; export it again")
