"""An ONNX file written tensor by tensor.

protobuf would hold the weights twice more, as a message and as its bytes. A message is its fields one after the other,
in any order, so the graph can be written as all of it but the weights, and then each weight as its field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_GRAPH, _INITIALIZER = 7, 5  # numbers of the fields in ModelProto and GraphProto (onnx.proto)
_STREAMED = 4096  # bytes from which a tensor is written alone
_BYTES = 2  # wire type of a field with a length
_LARGEST = 2**31 - 1  # of one message


def write_streamed(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write an onnx-ir model, which loses its large weights in doing so, and text to keep with it.

    Raises:
        ExportError: above 2 GB, which is the most that a protobuf message holds.
    """
    import onnx
    import onnx_ir

    from pyra.errors import ExportError

    weights = {}
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes >= _STREAMED:
            weights[name] = value.const_value
            del model.graph.initializers[name]
    if sum(tensor.nbytes for tensor in weights.values()) > _LARGEST - 2**26:
        raise ExportError("an ONNX file holds at most 2 GB of weights: export in half precision or int8")
    whole = onnx_ir.serde.serialize_model(model)
    for key, value in metadata.items():
        whole.metadata_props.add(key=key, value=value)
    graph = whole.graph.SerializeToString()
    whole.ClearField("graph")
    heads = {}
    for name, tensor in weights.items():
        head = onnx.TensorProto(name=name, dims=list(tensor.shape), data_type=int(tensor.dtype)).SerializeToString()
        raw = _field(_RAW_DATA, tensor.nbytes)
        heads[name] = _field(_INITIALIZER, len(head) + len(raw) + tensor.nbytes) + head + raw
    size = len(graph) + sum(len(head) for head in heads.values()) + sum(tensor.nbytes for tensor in weights.values())
    with open(path, "wb") as file:
        file.write(whole.SerializeToString())
        file.write(_field(_GRAPH, size) + graph)
        for name in list(weights):
            file.write(heads[name])
            file.write(weights.pop(name).tobytes())


_RAW_DATA = 9  # of TensorProto


def _field(number: int, length: int) -> bytes:
    """Return what a field that holds ``length`` bytes starts with."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
