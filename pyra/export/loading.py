"""Opening an exported folder: what it holds is checked first, and nothing in it runs unless its user says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyra.errors import ConfigError, ExportError, did_you_mean
from pyra.export.formats import FORMATS, OPENVINO, installed_runtimes, library_of, need
from pyra.export.record import ExportRecord, read_record

Run = Callable[[Tensor], Tensor]


class Exported:
    """A reloaded export: call it with pixel values to get logits.

    Attributes:
        format: it was written in.
        runtime: that runs it.
        metadata: text that was stored with it, such as the class names.
        record: all that ``export.json`` says.
    """

    def __init__(self, record: ExportRecord, runtime: str, run: Run) -> None:
        self.record, self.runtime = record, runtime
        self.format, self.metadata = record.format, record.metadata
        self._run = run

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, classes], float32, of pixel values [B, 3, H, W].

        Raises:
            ConfigError: for no tensor, or one of another shape than the model was exported for.
        """
        if not isinstance(pixel_values, Tensor):
            raise ConfigError(f"the exported model takes a tensor, got {type(pixel_values).__name__}")
        shape = list(pixel_values.shape)
        if shape[1:] != self.record.input_shape or not shape[0]:
            expected = ", ".join(map(str, self.record.input_shape))
            raise ConfigError(f"the exported model takes pixel values [B, {expected}] with B >= 1, got {shape}")
        return self._run(pixel_values.detach().float().cpu()).float()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(format={self.format!r}, runtime={self.runtime!r})"


def load_exported(
    folder: str | Path, *, runtime: str | None = None, threads: int | None = None, trust_code: bool = False
) -> Exported:
    """Open an exported folder.

    Args:
        folder: that :func:`pyra.export.export_model` or ``pyra export`` wrote.
        runtime: ``"pytorch"``, ``"onnxruntime"`` or ``"openvino"``, of those that open its format; None takes the first
            that is installed.
        threads: that the runtime uses; None leaves it to PyTorch's number of threads.
        trust_code: open a format that is machine code (``aoti``). Whoever made the file then runs what they like with
            your rights: say so of folders that you made, or whose maker you trust. No other format runs code.

    Returns:
        A callable from pixel values [B, 3, H, W] to logits [B, classes], both tensors on the CPU.

    Raises:
        ExportError: where the folder holds no finished export, or a damaged one.
        ConfigError: where the runtime is unknown, cannot open the format or is not installed (names the extra), or the
            format is machine code and ``trust_code`` is false.
    """
    folder = Path(folder).expanduser()
    record = read_record(folder)
    format = FORMATS[record.format]
    if format.native and not trust_code:
        raise ConfigError(
            f"{folder}: {format.name} is machine code, which runs with your rights when it is opened; where you trust "
            "its maker, say so with trust_code=True (--trust-code)"
        )
    if runtime is not None and runtime not in format.runtimes:
        close = did_you_mean(runtime, format.runtimes)
        raise ConfigError(
            f"runtime {runtime!r} does not open {format.name}{close}; it opens in {', '.join(format.runtimes)}"
        )
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads must be a positive whole number, got {threads!r}")
    chosen = runtime or next(iter(installed_runtimes(format)), format.runtimes[0])
    for library in (library_of(chosen), *(format.libraries if chosen == "pytorch" else ())):
        need(library, f"opening {format.name}", OPENVINO if library == OPENVINO else format.extra)
    return Exported(record, chosen, open_in(folder, record, chosen, threads))


def open_in(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Run:
    """Open the files of a folder in a runtime that is installed; see :func:`load_exported`."""
    format = FORMATS[record.format]
    module = importlib.import_module(f"pyra.export.{format.module}")
    opened: Run = module.open_file(folder, record, runtime, threads)

    def run(pixel_values: Tensor) -> Tensor:
        with torch.inference_mode():
            return opened(pixel_values)

    return run


def damaged(path: Path, error: Exception) -> ExportError:
    """Return the error for a file that its runtime cannot read."""
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return ExportError(f"{path}: not a readable {path.suffix.lstrip('.').upper()} file ({said})")
