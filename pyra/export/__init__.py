"""Deployment: an adapted model as one file that runs without this library.

Every export is reloaded and compared with the model before it counts as done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyra.errors import ConfigError, did_you_mean
from pyra.export.report import ExportReport

FORMATS = ("onnx",)

__all__ = ["FORMATS", "ExportReport", "export_model", "load_exported"]


def export_model(
    model: nn.Module,
    folder: str | Path,
    format: str = "onnx",
    *,
    example_input: Tensor,
    tolerance: float = 1e-3,
    metadata: dict[str, str] | None = None,
) -> ExportReport:
    """Write ``model`` to ``folder``, reload it and compare the two.

    Args:
        model: a backbone, wrapped or not; PEFT layers are folded in a copy.
        folder: receives ``model.onnx`` and ``export.json``, the report.
        format: ``"onnx"``.
        example_input: [B, 3, H, W] real inputs to trace and compare with; the batch size stays free.
        tolerance: largest difference of the logits of an input that counts as agreement, relative to the largest logit.
            Where tokens merge, a few inputs may differ (:mod:`pyra.export.report` says why); they are counted.
        metadata: text stored in the file, such as the class names.

    Returns:
        What was written and how it compares.

    Raises:
        ConfigError: unknown format, an input or a tolerance that is none, or the library it needs is missing (names the
            extra to install).
        ExportError: the reloaded model differs; no file that looks finished is left.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"unknown export format {format!r}{did_you_mean(format, FORMATS)}; there is {', '.join(FORMATS)}"
        )
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"the tolerance must be a number of at least 0, got {tolerance}")
    if not isinstance(example_input, Tensor) or example_input.ndim != 4 or not len(example_input):
        raise ConfigError("example_input must be a tensor [B, 3, H, W] with at least one image")
    if not example_input.isfinite().all():
        raise ConfigError("example_input holds NaN or infinite values: nothing could be compared on it")
    from pyra.export.onnx import export_onnx

    return export_onnx(model, Path(folder), example_input, tolerance, metadata or {})


def load_exported(folder: str | Path) -> Any:
    """Open an exported folder: a callable from pixel values [B, 3, H, W] to logits [B, classes], both tensors.

    Raises:
        ExportError: where the folder holds no readable export.
    """
    from pyra.export.onnx import OnnxModel

    return OnnxModel(Path(folder))
