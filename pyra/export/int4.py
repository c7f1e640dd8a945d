"""Models of JoyAI's kind with INT4 experts, in compressed-tensors' layout ``pack-quantized``: what engines serve.

Routed experts are rounded once, from the model's float weights, as :mod:`pyra.experts.quantising` has it; everything
else keeps its bits. Of each expert's ``gate_proj``, ``up_proj`` and ``down_proj`` the file holds ``weight_packed``
(eight integers in a word of 32 bits, the lowest bits first, shifted by 8), ``weight_scale`` (float32, a group of inputs
each) and ``weight_shape``. transformers, vLLM and SGLang open the folder as ``deepseek_v3``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyra.backbones.joyai import MODEL_TYPES, PUBLISHED
from pyra.backbones.joyai_checkpoint import CONFIG, INDEX, MTP, check_checkpoint, drafting_weights
from pyra.backbones.joyai_dequantised import open_weights
from pyra.backbones.joyai_mtp_weights import without_mtp
from pyra.checkpoints import writing
from pyra.errors import ConfigError, ExportError, OutputError, UnsupportedModelError
from pyra.experts.quantising import STACKS, QuantisingConfig, quantise, quantising_config, refuse_unfit, rounded
from pyra.files import read_json, write_json

FLOAT_MODULES = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.gate$",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj$",
    "re:.*eh_proj$",
)
"""What ``quantization_config`` tells engines to leave as it is: every linear layer but those of routed experts."""


def write_int4(
    model: nn.Module, folder: str | Path, group_size: int | None = None, *, mtp: str | Path | None = None
) -> None:
    """Write a model with its routed experts in INT4, a shard a layer, and read it again to compare.

    Memory beside the model is that of one layer as it is written.

    Args:
        model: of the class of DeepSeek-V3 or JoyAI, in float; fake-quantised or not.
        folder: that is made; it is there as a whole or not at all. The tokenizer is to be saved beside it.
        group_size: inputs that share a scale; None takes that of :func:`pyra.experts.fake_quantise`, or 64.
        mtp: a checkpoint folder whose MTP weights go along, as floats; without it those of an attached layer do, or the
            configuration says that there are none.

    Raises:
        UnsupportedModelError: for a model of another kind.
        ConfigError: for an adapter that is not folded, a group size that does not divide the experts' widths or is not
            the one that the model was trained with, or weights that were rounded already.
        OutputError: where ``folder`` holds something already.
        CheckpointError: where ``mtp`` holds no MTP weights, or those of another width.
        ExportError: for weights that are NaN or infinite, or where what is read again differs.

    Example:
        >>> write_int4(model, "joyai-int4")  # doctest: +SKIP
    """
    config = _checked(model, group_size)
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already: choose another folder")
    drafting, layers = drafting_weights(model, mtp)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with writing(staging):
            _write_weights(model, staging, config, drafting)
            _write_config(model, staging, config, layers)
        _compare(model, staging, config)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def quantization_config(group_size: int) -> dict[str, Any]:
    """Return what ``config.json`` says of the experts, in the words of compressed-tensors."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "observer": "minmax",
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": "pack-quantized"}},
        "ignore": list(FLOAT_MODULES),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def pack(values: Tensor) -> Tensor:
    """Return integers of -8 to 7 [R, C], C a multiple of 8, as words of 32 bits [R, C / 8].

    >>> pack(torch.tensor([[1, 0, -8, 0, 0, 0, 0, 7]], dtype=torch.int8)).item() & 0xFFFFFFFF == 0xF8888089
    True
    """
    nibbles = (values.to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (nibbles << shifts).sum(dim=-1, dtype=torch.int32)


def _checked(model: nn.Module, group_size: int | None) -> QuantisingConfig:
    told: Any = getattr(model, "config", None)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError("write_int4 rounds weights, and this model carries an adapter: fold_adapter it first")
    if getattr(told, "model_type", None) not in MODEL_TYPES or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"write_int4 writes language models of JoyAI's kind ({', '.join(MODEL_TYPES)}), got {type(model).__name__}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("write_int4 rounds floats, and transformers holds this model quantised: open it as floats")
    trained = quantising_config(model)
    config = QuantisingConfig(group_size=group_size or (trained.group_size if trained else 64))
    if trained not in (None, config):
        assert trained is not None
        raise ConfigError(
            f"the model works with {trained.bits} bits in groups of {trained.group_size}, and INT4 in groups of "
            f"{config.group_size} was asked for: leave group_size out, or undo_fake_quantise the model first"
        )
    refuse_unfit(model, config)
    return config


def _write_weights(model: Any, folder: Path, config: QuantisingConfig, drafting: dict[str, Tensor]) -> None:
    """Write a shard a layer, the MTP shard and the index."""
    shards = _shards(model)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: part for name, value in names.items() for key, part in _stored(name, value, config)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file)
    if drafting:
        save_file(drafting, folder / MTP, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(drafting, MTP)
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _shards(model: Any) -> list[dict[str, Tensor]]:
    """Return the model's tensors, a dict a layer: the embedding is with the first, the head with the last."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for name, value in without_mtp(model.state_dict()).items():
        if name != tied:
            number = name.split(".")[2] if name.startswith("model.layers.") else ""
            shards[int(number) if number else 0 if "embed_tokens" in name else -1][name] = value
    return shards


def _stored(name: str, value: Tensor, config: QuantisingConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield what the file holds of a tensor of the model."""
    if not _is_stack(name):
        yield name, value.detach().cpu().contiguous()
        return
    for weight, matrix in _matrices(name, value):
        if not matrix.isfinite().all():
            raise ExportError(f"{weight} holds NaN or infinite values: there is nothing to round")
        values, scale = quantise(matrix, config)
        yield f"{weight}_packed", pack(values).cpu()
        yield f"{weight}_scale", scale.cpu()
        yield f"{weight}_shape", torch.tensor(matrix.shape)


def _is_stack(name: str) -> bool:
    return name.endswith(tuple(f".experts.{stack}" for stack in STACKS))


def _matrices(name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices that a stack consists of, by their names in a checkpoint."""
    stem, _, projection = name.rpartition(".")
    for expert, matrix in enumerate(stack.detach()):
        if projection == "down_proj":
            yield f"{stem}.{expert}.down_proj.weight", matrix
        else:
            for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                yield f"{stem}.{expert}.{part}.weight", half


def _write_config(model: Any, folder: Path, config: QuantisingConfig, drafting_layers: int) -> None:
    model.config.save_pretrained(folder)
    values = read_json(folder / CONFIG)
    values |= {"architectures": PUBLISHED["architectures"], "model_type": "deepseek_v3"}
    values["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    values["num_nextn_predict_layers"] = drafting_layers
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]  # engines with an older transformers read this one
    values["quantization_config"] = quantization_config(config.group_size)
    write_json(folder / CONFIG, values)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _compare(model: nn.Module, folder: Path, config: QuantisingConfig) -> None:
    """Read what was written, weight by weight, and raise :class:`ExportError` where a bit differs from the model."""
    checkpoint = check_checkpoint(folder)
    weights = open_weights(checkpoint.folder, checkpoint.files, checkpoint.storage)
    for shard in _shards(model):
        for name, value in shard.items():
            pairs = _matrices(name, value) if _is_stack(name) else iter([(name, value)])
            for weight, own in pairs:
                meant = rounded(own, config) if _is_stack(name) else own
                if weight not in weights or not torch.equal(weights[weight][...].to(own.dtype), meant.cpu()):
                    raise ExportError(f"{weight} is not what was written: the disk may be damaged; export again")
