"""The formats of an export: what each needs, what opens it, and how near it is to be."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pyra.errors import ConfigError, did_you_mean

PYTORCH, ONNXRUNTIME, OPENVINO = "pytorch", "onnxruntime", "openvino"

_EXACT, _HALF, _INT8, _INT4 = 1e-3, 0.05, 0.35, 0.6


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    Attributes:
        name: as users give it.
        text: what it is, in a few words.
        file: that holds the weights.
        module: of this package that writes and opens it.
        runtimes: that open it, the default first; it is compared in each that is installed.
        extra: of the distribution that installs what it needs.
        libraries: it cannot be written without.
        tolerance: largest difference of the logits of an input, as a share of the largest logit. For formats that round
            it tells a broken export from a working one, not a good one from a bad one: that is what scoring is for.
        native: whether opening it runs machine code from the file.
    """

    name: str
    text: str
    file: str
    module: str
    runtimes: tuple[str, ...] = (PYTORCH,)
    extra: str | None = None
    libraries: tuple[str, ...] = ()
    tolerance: float = _EXACT
    native: bool = False

    @property
    def rounds(self) -> bool:
        """Whether values are rounded to fewer bits than the model has: its accuracy is then worth a measurement."""
        return self.tolerance > _EXACT


def _onnx(name: str, text: str, tolerance: float, runtimes: tuple[str, ...]) -> Format:
    needed = ("onnx", "onnxruntime", "onnxscript")
    return Format(name, text, "model.onnx", "onnx", runtimes, "onnx", needed, tolerance)


_BOTH = (ONNXRUNTIME, OPENVINO)

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("hf", "safetensors and config.json, as timm or transformers writes them", "model.safetensors", "hf"),
        Format("torch-export", "an ExportedProgram of torch.export", "model.pt2", "programs"),
        Format(
            "aoti", "compiled for this machine by AOTInductor, without Python", "model.pt2", "compiled", native=True
        ),
        _onnx("onnx", "ONNX, float32", _EXACT, _BOTH),
        _onnx("onnx-fp16", "ONNX, float16", _HALF, _BOTH),
        _onnx("onnx-bf16", "ONNX, bfloat16", _HALF, (OPENVINO,)),
        _onnx("onnx-int8", "ONNX, weights and activations int8, ranges from calibration", _INT8, _BOTH),
        _onnx("onnx-int8-dynamic", "ONNX, weights and activations int8, ranges found in each run", _INT8, _BOTH),
        _onnx("onnx-int8-weights", "ONNX, weights int8, activations float32", _INT8, _BOTH),
        Format(
            "torchao-int8",
            "PyTorch, weights int8, activations too, as torchao does",
            "model.safetensors",
            "quantised",
            extra="torchao",
            libraries=("torchao",),
            tolerance=_INT8,
        ),
        Format(
            "torchao-int4",
            "PyTorch, weights int4 in groups, as torchao does",
            "model.safetensors",
            "quantised",
            extra="torchao",
            libraries=("torchao",),
            tolerance=_INT4,
        ),
    )
}
"""By name."""


def format_named(name: str) -> Format:
    """Return a format whose libraries are there.

    Raises:
        ConfigError: for an unknown name, or a missing library (names the extra to install).
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown export format {name!r}{did_you_mean(name, FORMATS)}; there is {', '.join(FORMATS)}")
    format = FORMATS[name]
    for library in (*format.libraries, *(() if len(format.runtimes) > 1 else map(library_of, format.runtimes))):
        need(library, f"the format {name}", OPENVINO if library == OPENVINO else format.extra)
    return format


def installed_runtimes(format: Format) -> list[str]:
    """Return the runtimes of a format that are installed, the default first."""
    return [name for name in format.runtimes if _is_installed(library_of(name))]


def library_of(runtime: str) -> str:
    """Return the library that a runtime is."""
    return "torch" if runtime == PYTORCH else runtime


def need(library: str, what: str, extra: str | None) -> None:
    """Raise :class:`ConfigError`, which names the extra, where a library is not installed."""
    if not _is_installed(library):
        raise ConfigError(f"{what} needs {library}: pip install 'pyra-adapt[{extra}]'")


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # in sys.modules, but None
        return False
