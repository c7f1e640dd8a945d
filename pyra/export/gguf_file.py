"""``gguf``: one file for llama.cpp, written tensor after tensor, held against its names, read back and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from pyra.checkpoints import writing
from pyra.errors import ExportError
from pyra.export.engine_config import engine_values, family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.export.gguf_keys import add_keys, deepseek_values, refuse_other_sums
from pyra.export.gguf_layout import ARCHITECTURES, Laid, laid_out, stock_state
from pyra.export.gguf_words import add_words
from pyra.export.language import LanguageModel, Reloaded, Written, row_logits
from pyra.export.language_formats import GGUF_FILE

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
# Largest share of a number (floats) or of a block's largest one (Q8_0) that rounding to nearest may change.
_ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11}
_SMALLEST = 2**-24  # half a step of float16 where it is densest
_NO_MTP = "a GGUF file holds no MTP layers: llama.cpp passes over them"
_LOCAL: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_UNREAD = ("head_dim", "attention_bias", "mlp_bias")  # what transformers does not tell from the file's keys and tensors
_OWN_READER = "pyra's reader of GGUF, DeepseekV3ForCausalLM"


def write(subject: LanguageModel, folder: Path, weights: str) -> Written:
    """Write the file and hold it against the gguf library's list of the architecture's tensors."""
    model: Any = subject.model
    family = family_of(model)
    if family == DEEPSEEK:
        engine_values(model, "float32", 0)  # what engines compute otherwise is refused
    refuse_other_sums(family, model.config)
    path = folder / GGUF_FILE
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    add_keys(writer, family, model.config, weights, Path(subject.source).name)
    words = add_words(writer, subject.tokenizer, model.config.vocab_size)
    count = 0
    for laid in laid_out(model):
        kind = _kind(laid, weights)
        shape = gguf.quant_shape_to_byte_shape(laid.value.shape, kind) if _is_bytes(kind) else laid.value.shape
        dtype = np.dtype(np.uint8 if _is_bytes(kind) else np.float16 if kind.name == "F16" else np.float32)
        writer.add_tensor_info(laid.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, kind)
        count += laid.value.numel()
    with writing(path), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for laid in laid_out(model):
            writer.write_tensor_data(_rounded(laid, _kind(laid, weights)))
    path.chmod(0o644)
    engines = [check_gguf(path, subject)]
    mtp = {"layers": 0, **({"note": _NO_MTP} if family == DEEPSEEK else {})}
    notes = [words["note"]] if "note" in words else []
    return Written(ARCHITECTURES[family], count, engines, mtp, words, notes)


def _kind(laid: Laid, weights: str) -> gguf.GGMLQuantizationType:
    """Return what a tensor is stored as: rows that make no whole blocks go in float16, as llama.cpp has it."""
    if laid.keep:
        return gguf.GGMLQuantizationType.F32
    kind = _TYPES[weights]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if laid.value.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _is_bytes(kind: gguf.GGMLQuantizationType) -> bool:
    return kind.name not in ("F32", "F16")


def _rounded(laid: Laid, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    numbers = laid.value.to("cpu", torch.float32).contiguous().numpy()
    if kind.name == "F16" and np.abs(numbers).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"{laid.name} has numbers that float16 cannot hold: write gguf-bf16 or gguf-f32")
    return np.ascontiguousarray(gguf.quantize(numbers, kind))


def check_gguf(path: Path, subject: LanguageModel) -> dict[str, Any]:
    """Hold a file against the names that the gguf library lists for its architecture, and against the model's tensors.

    Raises:
        ExportError: for a tensor that is missing, unknown, of another shape, or not the model's, rounded.
    """
    reader, model = open_gguf(path), subject.model
    config: Any = model.config
    architecture = read_keys(reader).get("general.architecture")
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = {laid.name: laid for laid in laid_out(model)}
    known = _known_names(str(architecture), config.num_hidden_layers)
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not known" for name in found if name not in expected or _stem(name) not in known]
    for name in expected.keys() & found.keys():
        laid = expected[name]
        shape = [int(side) for side in reversed(found[name].shape)]
        if shape != list(laid.value.shape):
            problems.append(f"{name} is {shape}, not {list(laid.value.shape)}")
        elif not _holds(found[name], laid):
            problems.append(f"{name} does not hold the model's weights")
    if problems:
        raise ExportError(f"{path} is not what llama.cpp reads: {'; '.join(sorted(problems)[:6])}")
    return {
        "engine": "llama.cpp",
        "version": f"gguf {distributions.version('gguf')}",
        "source": "gguf/constants.py",
        "tensors": len(found),
        "passed_over": 0,
        "parameters": len({name.split(".", 2)[-1] for name in found}),
    }


def _known_names(architecture: str, layers: int) -> set[str]:
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ExportError(f"the gguf library knows no architecture {architecture!r}")
    return {TENSOR_NAMES[one].format(bid=layer) for one in MODEL_TENSORS[arch] for layer in range(layers)}


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _holds(tensor: Any, laid: Laid) -> bool:
    """Whether a stored tensor is the model's, within what rounding to nearest changes."""
    stored, own = numbers(tensor), laid.value.to("cpu", torch.float32)
    kind = tensor.tensor_type.name
    room = own.abs()
    if kind == "Q8_0":
        room = own.reshape(-1, 32).abs().amax(-1, keepdim=True).expand(-1, 32).reshape(own.shape)
    room = room * _ROUNDING[kind] + (_SMALLEST if kind == "F16" else 0.0)
    return bool(((stored - own).abs() <= room).all())


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a file; raises :class:`ExportError` for one that is damaged."""
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # of a file that may hold anything
        raise ExportError(f"{path}: not a readable GGUF file ({' '.join(str(error).split())[:200]})") from None


def read_keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return the keys of a file and their values, without the long lists of the tokenizer."""
    return {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}


def numbers(tensor: Any) -> Tensor:
    """Return a stored tensor in float32, in the shape that PyTorch has it."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape([int(side) for side in reversed(tensor.shape)])


def reload(subject: LanguageModel, folder: Path, weights: str, rows: Sequence[Sequence[int]]) -> Reloaded:
    """Open the file in transformers, where that reads the architecture, or else by :func:`read_deepseek`.

    Raises:
        ExportError: where that fails.
    """
    difference = max(_differences(folder / GGUF_FILE, subject), default=0.0)
    if family_of(subject.model) == DEEPSEEK:
        return Reloaded(_OWN_READER, row_logits(read_deepseek(folder / GGUF_FILE), rows), difference)
    try:
        config = AutoConfig.from_pretrained(str(folder), gguf_file=GGUF_FILE, **_LOCAL)
        for name in _UNREAD:
            if hasattr(subject.model.config, name):
                setattr(config, name, getattr(subject.model.config, name))
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=GGUF_FILE, config=config, dtype=torch.float32, **_LOCAL
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"transformers cannot open the GGUF file ({said}); nothing was written") from None
    return Reloaded(f"transformers {type(model).__name__}", row_logits(model.eval(), rows), difference)


def _differences(path: Path, subject: LanguageModel) -> Iterator[float]:
    found = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    for laid in laid_out(subject.model):
        yield float((numbers(found[laid.name]) - laid.value.to("cpu", torch.float32)).abs().max())


def read_deepseek(path: str | Path) -> DeepseekV3ForCausalLM:
    """Open a ``deepseek2`` file as transformers' model, in float32: transformers 5.23 has no reader of its own for it.

    Raises:
        ExportError: where the file is damaged, of another architecture, or its tensors do not fit its keys.
    """
    reader = open_gguf(Path(path))
    keys = read_keys(reader)
    if keys.get("general.architecture") != "deepseek2":
        raise ExportError(f"{path} is of architecture {keys.get('general.architecture')!r}, not deepseek2")
    config = DeepseekV3Config(**deepseek_values(keys))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    try:
        state = stock_state({tensor.name: numbers(tensor) for tensor in reader.tensors}, config)
        model.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: its tensors are not those of its keys ({said})") from None
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # no weight: it was made on the meta device
    return model.eval().requires_grad_(False)
