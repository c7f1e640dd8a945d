"""Quantised releases of JoyAI-LLM Flash (FP8, INT8, INT4): which weights their tensors stand for, told from headers.

They are read as floats (:mod:`pyra.backbones.joyai_dequantised`). transformers stacks the experts of such a release in
float, too, but with flaws (seen in 5.23, without a GPU): where the last block of scales is not full, as in
``kv_a_proj_with_mqa`` (576 rows in blocks of 128), it fails or takes the wrong scales, and INT4 experts become float32
in a bfloat16 model. Kept as they are, quantised weights are for serving engines.

Names and layouts: DeepSeek-V3's ``config.json`` and ``inference/kernel.py``; compressed-tensors 0.20, ``compressors/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyra.errors import CheckpointError

METHODS = ("fp8", "compressed-tensors")
"""What ``quant_method`` of a release may say: DeepSeek's own, and that of compressed-tensors."""

_PART = re.compile(r"(.+\.weight)_(packed|scale|scale_inv|shape|zero_point|g_idx|global_scale)")
_OF_ACTIVATIONS = re.compile(r".+\.(input|output|activation|[qkv])_(scale|zero_point|global_scale)")
_NARROW = ("F8_E4M3", "F8_E5M2", "I8")  # as headers of safetensors name them
_FLOATS = ("F64", "F32", "F16", "BF16")
_PACKED_BITS = (2, 4, 8)  # those that fill a word of 32 bits


@dataclass(frozen=True)
class Scheme:
    """How a release stores weights, as its configuration says.

    Attributes:
        name: for people, such as ``INT4 in groups of 64``.
        bits: of packed integers; None where there are none.
        blocks: rows and columns that share a scale.
    """

    name: str
    bits: int | None
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Storage:
    """The weights that the tensors of a checkpoint stand for.

    Attributes:
        shapes: of the weights as floats, by name.
        parts: of each quantised weight, the tensors that make it up: ``weight`` or ``packed``, ``scale``, ``shape``.
        blocks: of each quantised weight, the rows and columns that share a scale.
        scheme: None where nothing is quantised.
        problems: what does not fit, a line each.
    """

    shapes: dict[str, list[int]]
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    scheme: Scheme | None = None
    problems: list[str] = field(default_factory=list)


def read_storage(told: object, shapes: Mapping[str, list[int]], dtypes: Mapping[str, str]) -> Storage:
    """Say which weights the tensors of a checkpoint stand for, from their headers alone.

    Args:
        told: ``quantization_config`` of the checkpoint's configuration; None where it has none.
        shapes: of its tensors.
        dtypes: of its tensors, as headers of safetensors name them.

    Raises:
        CheckpointError: for quantised tensors of a kind that is not read.
    """
    plain: dict[str, list[int]] = {}
    parts: dict[str, dict[str, str]] = {}
    for name, shape in shapes.items():
        if found := _PART.fullmatch(name):
            part = "scale" if found[2] == "scale_inv" else found[2]
            parts.setdefault(found[1], {})[part] = name
        elif dtypes[name] in _NARROW:
            parts.setdefault(name, {})["weight"] = name
        elif not _OF_ACTIVATIONS.fullmatch(name):
            plain[name] = shape
    scheme = read_scheme(told) if isinstance(told, dict) and told else None
    if not parts:
        return Storage(plain)
    if scheme is None:
        raise CheckpointError(
            f"{next(iter(parts))} is quantised, and config.json has no quantization_config that says how: download "
            "again, or open the bfloat16 release"
        )
    storage = Storage(plain, parts, scheme=scheme)
    for weight, tensors in parts.items():
        if problem := _add(storage, scheme, weight, tensors, shapes, dtypes):
            storage.problems.append(problem)
    return storage


def _add(
    storage: Storage,
    scheme: Scheme,
    weight: str,
    tensors: dict[str, str],
    shapes: Mapping[str, list[int]],
    dtypes: Mapping[str, str],
) -> str | None:
    """Add a quantised weight to what is stored, or say what is wrong with it."""
    kind = "packed" if "packed" in tensors else "weight"
    if kind not in tensors:
        return f"{weight} is float and has a scale" if weight in storage.shapes else f"{weight} is left out"
    if odd := [part for part in ("g_idx", "global_scale") if part in tensors]:
        return f"{tensors[odd[0]]} is of a kind that is not read: open the bfloat16 release"
    if "scale" not in tensors or dtypes[tensors["scale"]] not in _FLOATS:
        return f"{weight} has no scale" + (" of floats" if "scale" in tensors else "")
    stored, scale = shapes[tensors[kind]], shapes[tensors["scale"]]
    if kind == "packed":
        if scheme.bits is None or dtypes[tensors["packed"]] != "I32" or len(stored) != 2:
            return f"{tensors['packed']} is no integers in 32-bit words, which is what is read"
        stored = [*stored[:-1], stored[-1] * 32 // scheme.bits]
    block = _block(stored, scale, scheme.blocks)
    if block is None:
        return f"{weight} of {stored} has scales of {scale}, which its configuration does not explain"
    storage.shapes[weight], storage.blocks[weight] = stored, block
    return None


def _block(shape: list[int], scale: list[int], told: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where there is no telling."""
    if len(shape) != 2:
        return None
    rows, columns = shape
    if scale in ([], [1], [1, 1]):
        return rows, columns
    if scale in ([rows], [rows, 1]):
        return 1, columns
    return next((each for each in told if scale == [-(-rows // each[0]), -(-columns // each[1])]), None)


def read_scheme(told: Mapping[str, Any]) -> Scheme:
    """Read a ``quantization_config``.

    Raises:
        CheckpointError: for one of another kind than :data:`METHODS`, or an option that is not read; says what to do.
    """
    method = told.get("quant_method")
    if method not in METHODS:
        raise _refused(f"quant_method is {method!r}, not one of {', '.join(METHODS)}")
    try:
        if method == "fp8":
            block = told.get("weight_block_size")
            rows, columns = (0, 0) if block is None else (int(block[0]), int(block[1]))
            blocks = ((rows, columns),) if min(rows, columns) > 0 else ()
            return Scheme(f"FP8 in blocks of {rows} × {columns}" if blocks else "FP8", None, blocks)
        return _compressed_tensors(told)
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        raise _refused("it cannot be read") from None


def _compressed_tensors(told: Mapping[str, Any]) -> Scheme:
    for option in ("transform_config", "sparsity_config"):
        if told.get(option):
            raise _refused(f"it has a {option}")
    groups = [group["weights"] for group in told["config_groups"].values() if group.get("weights")]
    if any(not group.get("symmetric", True) for group in groups):
        raise _refused("its weights are not symmetric")
    blocks, names = [], []
    for group in groups:
        strategy, size, sides = group.get("strategy"), group.get("group_size"), group.get("block_structure")
        shared = {"group": f" in groups of {size}", "channel": ", a scale a row", "tensor": ", a scale a matrix"}
        if strategy == "group":
            blocks.append((1, int(size)))
        elif strategy == "block":
            blocks.append((int(sides[0]), int(sides[1])))
            shared["block"] = f" in blocks of {sides[0]} × {sides[1]}"
        prefix = "FP" if group.get("type") == "float" else "INT"
        names.append(f"{prefix}{group['num_bits']}{shared.get(strategy, '')}")
    if any(min(each) < 1 for each in blocks):
        raise _refused("a group has no size")
    packed = {int(group["num_bits"]) for group in groups if group.get("type", "int") == "int"}
    bits = packed.pop() if len(packed) == 1 else None
    return Scheme("; ".join(dict.fromkeys(names)), bits if bits in _PACKED_BITS else None, tuple(blocks))


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"a quantised checkpoint that is not read (quantization_config: {reason}): open the bfloat16 release"
    )
