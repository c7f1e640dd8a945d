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
from pyra.backbones.joyai_dequantised import open_weights
from pyra.backbones.joyai_folder import CONFIG as CONFIG
from pyra.backbones.joyai_folder import INDEX as INDEX
from pyra.backbones.joyai_folder import MTP as MTP
from pyra.backbones.joyai_folder import SINGLE as SINGLE
from pyra.backbones.joyai_folder import Checkpoint as Checkpoint
from pyra.backbones.joyai_folder import check_checkpoint as check_checkpoint
from pyra.backbones.joyai_folder import read_header, read_json, some
from pyra.backbones.joyai_mtp import attach_mtp
from pyra.backbones.joyai_mtp_weights import mtp_weights, stored_mtp, without_mtp
from pyra.backbones.joyai_quantised import METHODS
from pyra.backbones.joyai_tokenizer import check_tokenizer as check_tokenizer
from pyra.checkpoints import writing
from pyra.errors import CheckpointError, ConfigError, OutputError
from pyra.files import write_json


def load_model(folder: str | Path, *, mtp: bool = False, **kwargs: Any) -> JoyAIForCausalLM:
    """Open a checkpoint folder, checked first; copies that call themselves ``deepseek_v3`` as well.

    A quantised release opens as floats (bfloat16, or ``dtype``) and takes as much memory as the release in bfloat16.

    Args:
        folder: of the checkpoint.
        mtp: attach its MTP layer (:func:`~pyra.backbones.joyai_mtp.attach_mtp`); without it, ``generate(use_mtp=True)``
            reads the layer from the folder at each call.
        kwargs: of transformers' ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        CheckpointError: see :func:`check_checkpoint`; and where tensors of the model are missing, or with ``mtp`` the
            layer is.
        ConfigError: for a ``quantization_config`` where the checkpoint is quantised already.
    """
    checkpoint = check_checkpoint(folder)
    if mtp and not checkpoint.mtp:
        raise CheckpointError(f"{folder} holds no MTP weights: leave mtp out, or give a folder that has them")
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
    return attach_mtp(model, checkpoint.folder) if mtp else model


def _as_it_is(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """Say what ``from_pretrained`` reads; a configuration that speaks of quantised weights has none."""
    return str(checkpoint.folder), {"config": _without_quantisation(checkpoint.config)}


def _as_floats(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """Say what ``from_pretrained`` reads where weights are dequantised: no folder, but weights by name."""
    config = _without_quantisation(checkpoint.config)
    config.dtype = config.dtype or torch.bfloat16
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


def drafting_weights(model: Any, mtp: str | Path | None) -> tuple[dict[str, Tensor], int]:
    """Return the MTP weights that go along with a model into a checkpoint, and of how many layers they are.

    Args:
        model: of the class of JoyAI or DeepSeek-V3.
        mtp: a checkpoint folder that has them; None takes those of the layer that is attached, if one is.

    Raises:
        ConfigError: for a folder where a layer is attached.
        CheckpointError: where the folder holds none, or those of another width.
    """
    attached = getattr(model, "mtp", None)
    if mtp is None:
        return ({}, 0) if attached is None else (mtp_weights(model, model.state_dict()), 1)
    if attached is not None:
        raise ConfigError(
            f"the model has an MTP layer attached: leave mtp={str(mtp)!r} out, or detach_mtp(model) first"
        )
    source = check_checkpoint(mtp)
    return stored_mtp(source, model), source.config.num_nextn_predict_layers


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
        model: to write; weights keep their bits. An attached MTP layer goes along.
        folder: that is made; it is there as a whole or not at all.
        mtp: a checkpoint folder whose MTP weights go along instead, as floats where they are quantised; without either
            the configuration says that there are none.
        shard: size of a file at most, as transformers reads it.
        model_type: what the configuration calls itself; as ``deepseek_v3`` transformers opens it without pyra.

    Raises:
        ConfigError: for an unknown ``model_type``, a model of another class, such as one with an adapter around it,
            one whose weights transformers holds quantised, or ``mtp`` for one that has an MTP layer attached.
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
    drafting, layers = drafting_weights(model, mtp)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with writing(staging):
            model.save_pretrained(staging, max_shard_size=shard, state_dict=without_mtp(model.state_dict()))
            if drafting:
                save_file(drafting, staging / MTP, metadata={"format": "pt"})
        _index(staging, drafting)
        values = read_json(staging / CONFIG)
        values |= {"architectures": PUBLISHED["architectures"], "model_type": model_type}
        values["num_nextn_predict_layers"] = layers
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
