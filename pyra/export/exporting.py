"""From a model to a folder: fold, write, reload in each runtime, compare, and only then put it in place."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import geometry, is_decoder, macs, wrapped_schedule
from pyra.checkpoints import file_digest, writing
from pyra.errors import ConfigError, ExportError, PyraError, is_out_of_memory
from pyra.export.folding import folded_copy
from pyra.export.formats import FORMATS, Format, format_named, installed_runtimes
from pyra.export.linear_training import INT4, trains_as_rounded
from pyra.export.loading import open_in
from pyra.export.logits import logits_of
from pyra.export.memory import give_memory_back
from pyra.export.record import RECORD, ExportRecord
from pyra.export.report import ExportReport, compare
from pyra.files import read_json, write_json

_RANDOM = 8  # random inputs compared besides the real ones
_BATCH = 2  # inputs a forward of a comparison: more would take OpenVINO more memory than the weights
_STAGING = ".partial-"
_BESIDE = ("config.json", "preprocessor_config.json", "README.md")  # files of some formats beside the weights
_LIBRARIES = ("pyra-adapt", "torch", "onnx", "onnxruntime", "openvino", "torchao", "timm", "transformers")


@dataclass(frozen=True)
class Job:
    """What a format is written from, besides the model.

    Attributes:
        format: to write.
        example: [B, 3, H, W] real inputs, at least two (one is repeated: a batch of 1 would be taken for a constant).
        calibration: [M, 3, H, W] inputs that the ranges of activations are taken from.
        metadata: text to keep with the model.
        dtype: of the weights before they were folded in float32.
        schedule: tokens removed in each layer, or None.
    """

    format: Format
    example: Tensor
    calibration: Tensor
    metadata: dict[str, str]
    dtype: torch.dtype
    schedule: list[int] | None


def export_model(
    model: nn.Module,
    folder: str | Path,
    format: str = "onnx",
    *,
    example_input: Tensor,
    tolerance: float | None = None,
    metadata: dict[str, str] | None = None,
    calibration: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` to ``folder``, reload it and compare the two.

    Args:
        model: a backbone, wrapped or not; PEFT layers are folded in a copy, in float32.
        folder: receives the files of the format and ``export.json``, the record. An earlier export in it is replaced
            once the new one has held its comparison; other files stay.
        format: one of :data:`pyra.export.FORMATS`.
        example_input: [B, 3, H, W] real inputs to trace and compare with; the batch size stays free. Random inputs of
            the same shape are compared besides.
        tolerance: largest difference of the logits of an input that counts as agreement, relative to the largest logit;
            None means the format's own. Where tokens merge, a few inputs may differ (:mod:`pyra.export.report` says
            why); they are counted.
        metadata: text stored with the model, such as the class names.
        calibration: [M, 3, H, W] inputs from which ``onnx-int8`` takes the ranges of activations; None means
            ``example_input``.

    Returns:
        What was written and how it compares in each runtime that is installed.

    Raises:
        ConfigError: unknown format, an input or a tolerance that is none, or the library it needs is missing (names the
            extra to install).
        ExportError: the model cannot be written so, or the reloaded model differs; no file that looks finished is left.

    Example:
        >>> export_model(model, "exported/onnx", "onnx", example_input=images)  # doctest: +SKIP
    """
    chosen = format_named(format)
    if is_decoder(model):
        raise ExportError(
            f"{type(model).__name__} reads words: {format} is for image models; pyra.export.export_language_model and "
            "`pyra export --format engine` write language models"
        )
    if trains_as_rounded(model) and format != INT4:
        raise ConfigError(f"the model was trained as {INT4} rounds it: export it in that format, not as {format}")
    tolerance = _checked(chosen, example_input, tolerance, metadata, calibration)
    folder = Path(folder).expanduser()
    start = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    _refuse_foreign(folder, chosen)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        example = example_input.detach().float().cpu()
        job = Job(
            format=chosen,
            example=example if len(example) > 1 else example.repeat(2, 1, 1, 1),
            calibration=example if calibration is None else calibration.detach().float().cpu(),
            metadata=dict(metadata or {}),
            dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
            schedule=wrapped_schedule(model),
        )
        inputs = torch.cat([example, _random_like(example)])
        expected, operators = _written(model, staging, job, inputs)
        give_memory_back()
        real = len(example)
        if chosen.rounds:  # ranges were made for real inputs
            inputs, expected = inputs[:real], expected[:real]
        record = _record(model, staging, job, expected.shape[-1], tolerance, operators)
        comparisons = []
        for runtime in installed_runtimes(chosen):
            actual = _run(staging, record, runtime, inputs)
            give_memory_back()
            merges = any(job.schedule or ())
            comparisons.append(
                compare(runtime, expected, actual, tolerance=tolerance, merges=merges, real=min(real, len(expected)))
            )
        report = ExportReport(
            format=format,
            file=chosen.file,
            megabytes=record.megabytes,
            seconds=time.perf_counter() - start,
            comparisons=tuple(comparisons),
            operators=operators,
        )
        finished = {**asdict(record), "seconds": report.seconds, "comparisons": [asdict(c) for c in comparisons]}
        _swap_in(staging, folder, finished)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _checked(
    format: Format,
    example: Tensor,
    tolerance: float | None,
    metadata: dict[str, str] | None,
    calibration: Tensor | None,
) -> float:
    """Check the arguments; return the tolerance."""
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"the tolerance must be a number of at least 0, got {tolerance}")
    named = {"example_input": example, **({} if calibration is None else {"calibration": calibration})}
    for name, images in named.items():
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise ConfigError(f"{name} must be a tensor [B, 3, H, W] with at least one image")
        if not images.isfinite().all():
            raise ConfigError(f"{name} holds NaN or infinite values: nothing could be compared on it")
        if images.shape[1:] != example.shape[1:]:
            raise ConfigError(
                f"{name} is {list(images.shape)}, example_input {list(example.shape)}: not one image size"
            )
    if not isinstance(metadata, dict | None):
        raise ConfigError(f"metadata is text under names, a dict; got {type(metadata).__name__}")
    wrong = [text for pair in (metadata or {}).items() for text in pair if not _is_text(text)]
    if wrong:
        raise ConfigError(f"metadata is text under names; {wrong[0]!r} is no text")
    return format.tolerance if tolerance is None else tolerance


def _is_text(value: Any) -> bool:
    """Whether a value is text that a file can hold: half of a character is none."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _random_like(example: Tensor) -> Tensor:
    return torch.randn(_RANDOM, *example.shape[1:], generator=torch.Generator().manual_seed(0))


def _written(model: nn.Module, staging: Path, job: Job, inputs: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Fold, write; return the logits of the folded model, which ends with this call, and the operators of the graph."""
    with torch.no_grad():
        folded = folded_copy(model)
        try:
            expected = torch.cat([logits_of(folded(part)) for part in inputs.split(_BATCH)])
        except PyraError:
            raise
        except Exception as error:  # of the model's own code, which raises what comes up
            if is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise ExportError(
                f"the model cannot take inputs like example_input, {list(inputs.shape)}: {said}"
            ) from error
        if not expected.isfinite().all():
            raise ExportError("the model returns NaN or infinite logits: there is nothing to compare an export with")
        with writing(staging / job.format.file):
            operators = importlib.import_module(f"pyra.export.{job.format.module}").write(folded, staging, job)
    return expected, operators or {}


def _run(staging: Path, record: ExportRecord, runtime: str, inputs: Tensor) -> Tensor:
    """Return the logits of what was written, opened for this call alone; a batch of 1 and larger ones."""
    run = open_in(staging, record, runtime, threads=None)
    parts = [inputs[:1], *inputs[1:].split(_BATCH)]
    return torch.cat([run(part).float() for part in parts if len(part)])


def _record(
    model: nn.Module, staging: Path, job: Job, classes: int, tolerance: float, operators: dict[str, int]
) -> ExportRecord:
    paths = sorted(staging.iterdir())
    files = {path.name: path.stat().st_size for path in paths}
    merges = job.schedule is not None
    return ExportRecord(
        format=job.format.name,
        files=files,
        sha256={path.name: file_digest(path) for path in paths},
        input_shape=list(job.example.shape[1:]),
        classes=classes,
        schedule=job.schedule,
        rate=1 - macs(model) / macs(model, [0] * geometry(model).depth) if merges else None,
        metadata=job.metadata,
        tolerance=tolerance,
        megabytes=sum(files.values()) / 1e6,
        operators=operators,
        environment=versions(),
    )


def versions(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of the libraries that exports are made with, where they are installed, and of ``more``."""
    found = {}
    for name in (*_LIBRARIES, *more):
        try:
            found[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            continue
    return found


def _refuse_foreign(folder: Path, format: Format) -> None:
    """Refuse to replace a file that no export wrote."""
    earlier = _earlier(folder)
    taken = [name for name in (format.file, *_BESIDE) if (folder / name).exists() and name not in earlier]
    if taken:
        raise ExportError(f"{folder} holds {taken[0]}, which is of no finished export: choose another folder")


def _earlier(folder: Path) -> list[str]:
    """Return the files that an earlier export wrote, whole or damaged; never one that no export writes."""
    written = {*_BESIDE, *(format.file for format in FORMATS.values())}
    try:
        return [name for name in read_json(folder / RECORD)["files"] if name in written]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _swap_in(staging: Path, folder: Path, record: dict[str, Any]) -> None:
    """Replace an earlier export: its record goes first, the new one comes last, so that no mixture looks finished."""
    earlier = _earlier(folder)
    (folder / RECORD).unlink(missing_ok=True)
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)
        path.replace(folder / path.name)
    write_json(folder / RECORD, record)
