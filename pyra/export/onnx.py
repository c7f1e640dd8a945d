"""``onnx``: merging inside the graph, the batch size free; in float32, half precision or int8.

The graph is made of operators that TensorRT, OpenVINO and DirectML have (nothing is scattered:
:mod:`pyra.kernels.exported`). What torch's exporter leaves - functions, constants computed in the graph, the same value
computed twice - is tidied by passes of onnx-ir and onnxscript. The exporter's own optimizer does more and takes longer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyra.errors import ExportError
from pyra.export.formats import ONNXRUNTIME
from pyra.export.loading import damaged
from pyra.export.logits import LogitsOnly, logits_of
from pyra.export.memory import give_memory_back
from pyra.export.onnx_file import write_streamed

if TYPE_CHECKING:
    from pyra.export.exporting import Job
    from pyra.export.record import ExportRecord

FILE = "model.onnx"
INPUT, OUTPUT = "pixel_values", "logits"
OPSET = 18
_HALVES = {"onnx-fp16": torch.float16, "onnx-bf16": torch.bfloat16}


def write(model: nn.Module, staging: Path, job: Job) -> dict[str, int]:
    """Write a folded model; return how often the graph has each operator."""
    name = job.format.name
    path = staging / FILE
    if name in _HALVES:
        model = _InHalf(model, _HALVES[name])
    graph = _graph(model, job)
    if name.startswith("onnx-int8"):
        from pyra.export.onnx_int8 import quantise

        plain = staging / "float32.onnx"
        write_streamed(graph, plain, job.metadata)
        del graph
        try:
            quantise(plain, path, name, job.calibration)
        finally:
            plain.unlink()
    else:
        write_streamed(graph, path, job.metadata)
        return _counted(node.op_type for node in graph.graph)
    return operators_of(path)


class _InHalf(nn.Module):
    """A model of half precision whose inputs and outputs are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits_of(self.model(pixel_values.to(self.dtype))).float()


def _graph(model: nn.Module, job: Job) -> Any:
    """Return the onnx-ir model of a folded model, tidied."""
    try:
        with _quiet():
            program = torch.onnx.export(
                model if isinstance(model, _InHalf) else LogitsOnly(model),
                (job.example[:2],),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            graph: Any = program.model
            _tidy(graph)
    except Exception as error:  # torch and onnxscript raise whatever came up in the model, or in themselves
        raise ExportError(f"torch.onnx cannot export this model: {' '.join(str(error).split())[:300]}") from None
    return graph


def _tidy(graph: Any) -> None:
    """Inline functions, fold constants, compute equal values once, drop the names of the exporting machine."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(graph)
    optimizer.fold_constants(graph)
    for tidying in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=False),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        tidying(graph)


def operators_of(path: Path) -> dict[str, int]:
    """Count the operators of an ONNX file, the most frequent first."""
    import onnx

    return _counted(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def _counted(operators: Iterable[str]) -> dict[str, int]:
    return dict(Counter(operators).most_common())


def open_file(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Callable[[Tensor], Tensor]:
    """Open ``model.onnx``; raises :class:`ExportError` where it is damaged."""
    path = folder / FILE
    opener = _in_onnxruntime if runtime == ONNXRUNTIME else _in_openvino
    try:
        return opener(path, threads or torch.get_num_threads())
    except Exception as error:  # both runtimes raise classes of their own, which have no common base
        raise damaged(path, error) from None


def onnxruntime_session(path: Path, threads: int) -> Any:
    """Open a file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _in_onnxruntime(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    session = onnxruntime_session(path, threads)

    def run(pixel_values: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: pixel_values.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def openvino_model(path: Path, threads: int) -> Any:
    """Open and compile a file in OpenVINO, on the CPU."""
    import openvino

    # Float32 unless the graph says otherwise: by default OpenVINO rounds to bfloat16 where the CPU is good at it.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    model = core.read_model(str(path))
    give_memory_back()  # of the file's bytes
    return core.compile_model(model, "CPU", options)


def _in_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    compiled = openvino_model(path, threads)

    def run(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(compiled([pixel_values.contiguous().numpy()])[0].copy())

    return run


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
