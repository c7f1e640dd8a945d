"""ONNX: merging inside the graph, the batch size free."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import wrapped_schedule
from pyra.errors import ConfigError, ExportError
from pyra.export.report import ExportReport, compare
from pyra.files import atomic_path, write_json

FILE, REPORT = "model.onnx", "export.json"
INPUT, OUTPUT = "pixel_values", "logits"
OPSET = 18


def export_onnx(
    model: nn.Module, folder: Path, example: Tensor, tolerance: float, metadata: dict[str, str]
) -> ExportReport:
    """See :func:`pyra.export.export_model`."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 - needed to compare; told before the long work
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"ONNX export needs {error.name}: pip install 'pyra-adapt[onnx]'") from None
    copied: Any = copy.deepcopy(model).float().cpu().eval()
    model = copied.merge_and_unload() if hasattr(copied, "merge_and_unload") else copied
    example = example.detach().float().cpu()
    with torch.no_grad():
        expected = model(example)
        # A batch of 1 would be taken for a constant.
        traced = example if len(example) > 1 else example.repeat(2, 1, 1, 1)
        with _quiet():
            program = torch.onnx.export(
                model,
                (traced,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    assert program is not None
    proto = program.model_proto
    _forget_origins(proto)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    with atomic_path(folder / FILE) as temporary:
        onnx.save(proto, str(temporary))
        actual = torch.cat([_Session(temporary)(part) for part in (example[:1], example[1:]) if len(part)])
        report = compare(
            FILE,
            temporary.stat().st_size / 1e6,
            expected,
            actual,
            tolerance=tolerance,
            merges=any(wrapped_schedule(model) or ()),
        )
    write_json(folder / REPORT, {"format": "onnx", "opset": OPSET, "tolerance": tolerance, **asdict(report)})
    return report


def _forget_origins(proto: Any) -> None:
    """Drop the stack traces that the exporter stores with every node: they name paths of the exporting machine."""
    for part in (
        proto.graph.node,
        proto.graph.value_info,
        proto.graph.input,
        proto.graph.output,
        proto.graph.initializer,
    ):
        for item in part:
            del item.metadata_props[:]
            item.ClearField("doc_string")


class _Session:
    """An ONNX file in onnxruntime on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, pixel_values: Tensor) -> Tensor:
        (logits,) = self._session.run([OUTPUT], {INPUT: pixel_values.detach().float().cpu().contiguous().numpy()})
        return torch.from_numpy(logits)

    def metadata(self) -> dict[str, str]:
        return dict(self._session.get_modelmeta().custom_metadata_map)


class OnnxModel:
    """A reloaded export: call it with pixel values [B, 3, H, W] to get logits [B, classes].

    Raises:
        ExportError: where the folder holds no readable ``model.onnx``.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            raise ExportError(f"{folder}: no {FILE} there; give a folder written by export_model or `pyra export`")
        try:
            self._session = _Session(path)
        except ImportError:
            raise ConfigError("opening an ONNX export needs onnxruntime: pip install 'pyra-adapt[onnx]'") from None
        except Exception as error:  # onnxruntime raises its own classes, which have no common base
            raise ExportError(f"{path}: not a readable ONNX file ({' '.join(str(error).split())[:200]})") from None
        self.metadata = self._session.metadata()

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self._session(pixel_values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation chatter off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
