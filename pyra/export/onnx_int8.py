"""INT8 ONNX by onnxruntime's quantiser: ranges of activations from calibration, found in each run, or none at all.

What matches and merges tokens stays in float32: a similarity rounded to 8 bits is one tie after another. Only the
products with weights (`MatMul`, `Gemm` with an initializer) are quantised, which hold nearly all of the MACs.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pyra.errors import ExportError

_BATCH = 4  # images a forward of the calibration: what it records is kept for all of them
_BLOCK = 32  # inputs of a weight that share a scale, where only weights are quantised
_KINDS = ("MatMul", "Gemm")


def quantise(plain: Path, path: Path, format: str, calibration: Tensor) -> None:
    """Write an int8 model from a float32 one.

    Args:
        plain: the float32 file.
        path: to write.
        format: ``onnx-int8``, ``onnx-int8-dynamic`` or ``onnx-int8-weights``.
        calibration: [M, 3, H, W] inputs for the ranges of ``onnx-int8``.
    """
    with _quiet():
        nodes = products_with_weights(plain)
        if not nodes:
            raise ExportError("this model has no products with weights to quantise")
        if format == "onnx-int8":
            _static(plain, path, calibration, nodes)
        elif format == "onnx-int8-dynamic":
            _dynamic(plain, path, nodes)
        else:
            _weights(plain, path)


def products_with_weights(path: Path) -> list[str]:
    """Return the names of the nodes that multiply with a weight."""
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in _KINDS and node.input[1] in weights]


def _static(plain: Path, path: Path, calibration: Tensor, nodes: list[str]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(plain),
        str(path),
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_KINDS),
        nodes_to_quantize=nodes,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        # Sums of 8-bit products are kept in 32 bits everywhere but on CPUs without VNNI, where pairs saturate at 16.
        reduce_range=False,
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True, "CalibTensorRangeSymmetric": False},
    )


def _dynamic(plain: Path, path: Path, nodes: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(plain),
        str(path),
        op_types_to_quantize=list(_KINDS),
        nodes_to_quantize=nodes,
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def _weights(plain: Path, path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
    quantiser = MatMulNBitsQuantizer(onnx.load(str(plain)), algo_config=config)
    quantiser.process()
    onnx.save(quantiser.model.model, str(path))


class _Reader:
    """Feeds calibration images, as onnxruntime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._parts = iter(images.split(_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {"pixel_values": part.contiguous().numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser recommends preprocessing, which has been done
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
