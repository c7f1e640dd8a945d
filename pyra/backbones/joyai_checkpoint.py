"""Checkpoints of JoyAI-LLM Flash: what a folder must hold is checked before a weight is read, and it is written back.

A published folder holds ``config.json``, an index, a shard a layer with a matrix an expert, and a shard of the MTP
layer. Only safetensors are read. Quantised releases are read as floats (:mod:`pyra.backbones.joyai_dequantised`).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from pyra.backbones.joyai import MODEL_TYPES, PUBLISHED, JoyAIConfig, JoyAIForCausalLM
from pyra.backbones.joyai_dequantised import Dequantised, open_weights
from pyra.backbones.joyai_folder import CONFIG as CONFIG
from pyra.backbones.joyai_folder import INDEX as INDEX
from pyra.backbones.joyai_folder import MTP as MTP
from pyra.backbones.joyai_folder import SINGLE as SINGLE
from pyra.backbones.joyai_folder import Checkpoint as Checkpoint
from pyra.backbones.joyai_folder import check_checkpoint as check_checkpoint
from pyra.backbones.joyai_folder import read_header, read_json, some
from pyra.backbones.joyai_quantised import METHODS
from pyra.backbones.joyai_tokenizer import check_tokenizer as check_tokenizer
from pyra.checkpoints import writing
from pyra.errors import CheckpointError, ConfigError, OutputError
from pyra.files import write_json


def load_model(folder: str | Path, **kwargs: Any) -> JoyAIForCausalLM:
    """Open a checkpoint folder, checked first; copies that call themselves ``deepseek_v3`` as well.

    A quantised release opens as floats (bfloat16, or ``dtype``) and takes as much memory as the release in bfloat16.
    Where its MTP layer is quantised, too, ``generate(use_mtp=True)`` needs a folder that :func:`save_checkpoint` wrote
    with ``mtp``: transformers reads that layer from the folder, and knows no scales there.

    Args:
        folder: of the checkpoint.
        kwargs: of transformers' ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        CheckpointError: see :func:`check_checkpoint`; and where tensors of the model are missing.
        ConfigError: for a ``quantization_config`` where the checkpoint is quantised already.
    """
    checkpoint = check_checkpoint(folder)
    if checkpoint.quantised and "quantization_config" in kwargs:
        raise ConfigError(
            f"{folder} is quantised already ({checkpoint.quantised}) and opens as floats: leave quantization_config out"
        )
    source, given = (_as_floats if checkpoint.quantised else _as_it_is)(checkpoint)
    model, found = JoyAIForCausalLM.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **{"dtype": "auto", **given, **kwargs}
    )
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)  # where MTP weights are looked for
    if found["missing_keys"]:
        raise CheckpointError(f"{folder} leaves {some(sorted(found['missing_keys']))} out: download again")
    return model


def _as_it_is(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """Say what ``from_pretrained`` reads; a configuration that speaks of quantised weights has none."""
    return str(checkpoint.folder), {"config": _without_quantisation(checkpoint.config)}


def _as_floats(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """Say what ``from_pretrained`` reads where weights are dequantised: no folder, but weights by name."""
    config = _without_quantisation(checkpoint.config)
    config.dtype = config.dtype or torch.bfloat16
    if any(name in checkpoint.storage.parts for name in checkpoint.mtp):
        config.num_nextn_predict_layers = 0  # transformers would read them from the folder as they are, without scales
    given: dict[str, Any] = {
        "config": config,
        "state_dict": open_weights(checkpoint.folder, checkpoint.files, checkpoint.storage),
    }
    if (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        given["generation_config"] = GenerationConfig.from_pretrained(checkpoint.folder)
    return None, given


def _without_quantisation(config: JoyAIConfig) -> JoyAIConfig:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def save_checkpoint(
    model: JoyAIForCausalLM,
    folder: str | Path,
    *,
    mtp: str | Path | None = None,
    shard: str = "5GB",
    model_type: str = MODEL_TYPES[0],
) -> None:
    """Write a model in the published layout: a matrix an expert, and the MTP layer in a shard of its own.

    Args:
        model: to write; weights keep their bits.
        folder: that is made; it is there as a whole or not at all.
        mtp: a checkpoint folder whose MTP weights go along, as floats where they are quantised; without it the
            configuration says that there are none.
        shard: size of a file at most, as transformers reads it.
        model_type: what the configuration calls itself; as ``deepseek_v3`` transformers opens it without pyra.

    Raises:
        ConfigError: for an unknown ``model_type``, a model of another class, such as one with an adapter around it, or
            one whose weights transformers holds quantised.
        OutputError: where ``folder`` holds something already.
        CheckpointError: where ``mtp`` holds no MTP weights, or those of another width.
    """
    if not isinstance(model, JoyAIForCausalLM):
        raise ConfigError(
            f"save_checkpoint writes a JoyAIForCausalLM, got {type(model).__name__}: fold its adapter first"
        )
    if _method(getattr(model, "hf_quantizer", None)) in METHODS:
        raise ConfigError("save_checkpoint writes floats, and this model is quantised: open its folder with load_model")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already: choose another folder")
    source = None if mtp is None else check_checkpoint(mtp)
    drafting = {} if source is None else mtp_weights(source, model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with writing(staging):
            model.save_pretrained(staging, max_shard_size=shard)
            if drafting:
                save_file(drafting, staging / MTP, metadata={"format": "pt"})
        _index(staging, drafting)
        values = read_json(staging / CONFIG)
        values |= {"architectures": PUBLISHED["architectures"], "model_type": model_type}
        values["num_nextn_predict_layers"] = source.config.num_nextn_predict_layers if source else 0
        if _method(model.config) in METHODS:
            del values["quantization_config"]
        write_json(staging / CONFIG, values)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(folder: Path, drafting: Mapping[str, Tensor]) -> None:
    """Have the index name the MTP shard; a single file of weights becomes a shard, too, or it would be read alone."""
    if not drafting:
        return
    if (folder / SINGLE).is_file():
        shard = "model-00001-of-00001.safetensors"
        (folder / SINGLE).replace(folder / shard)
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(read_header(folder / shard), shard)}
    else:
        index = read_json(folder / INDEX)
    index["weight_map"] |= dict.fromkeys(drafting, MTP)
    size = sum((folder / file).stat().st_size for file in set(index["weight_map"].values()))
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    write_json(folder / INDEX, index)


def _method(holder: Any) -> str | None:
    """Return the method of a configuration or a quantiser that says how weights are quantised."""
    told = getattr(holder, "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def mtp_weights(checkpoint: Checkpoint, model: Any) -> dict[str, Tensor]:
    """Read the MTP weights of a checkpoint for a model, as floats of its type where they are quantised.

    Raises:
        CheckpointError: where there are none, or those of another width.
    """
    if not checkpoint.mtp:
        raise CheckpointError(f"{checkpoint.folder} holds no MTP weights")
    own, theirs = ((each.num_hidden_layers, each.hidden_size) for each in (model.config, checkpoint.config))
    if own != theirs:
        raise CheckpointError(
            f"{checkpoint.folder}: its MTP layer follows {theirs[0]} layers of width {theirs[1]}, the model has "
            f"{own[0]} of width {own[1]}"
        )
    stored = open_weights(checkpoint.folder, checkpoint.files, checkpoint.storage)
    weights: dict[str, Tensor] = {}
    for name in checkpoint.mtp:
        value: Tensor = stored[name][...]
        weights[name] = value.to(model.dtype) if isinstance(stored[name], Dequantised) else value
    return weights
