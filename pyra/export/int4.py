"""Models of JoyAI's kind with INT4 experts, in compressed-tensors' layout ``pack-quantized``: what engines serve.

Routed experts are rounded once, from the model's float weights, as :mod:`pyra.experts.quantising` has it; everything
else keeps its bits (:mod:`pyra.export.engine_weights` has the layout). transformers, vLLM and SGLang open the folder as
``deepseek_v3``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyra.backbones.joyai import MODEL_TYPES, PUBLISHED
from pyra.backbones.joyai_checkpoint import CONFIG, check_checkpoint, drafting_weights
from pyra.backbones.joyai_dequantised import open_weights
from pyra.checkpoints import writing
from pyra.errors import ConfigError, ExportError, OutputError, UnsupportedModelError
from pyra.experts.quantising import QuantisingConfig, quantising_config, refuse_unfit
from pyra.export.engine_rounding import quantization_config, rounded_experts
from pyra.export.engine_weights import Stored, by_layer, stored_tensors, write_weights
from pyra.files import read_json, write_json


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
    shards = _shards(model, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with writing(staging):
            write_weights(shards, staging, drafting)
            _write_config(model, staging, config, layers)
        _compare(shards, staging)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    usual = trained.group_size if trained else 64
    config = QuantisingConfig(group_size=usual if group_size is None else group_size)
    if trained not in (None, config):
        assert trained is not None
        raise ConfigError(
            f"the model works with {trained.bits} bits in groups of {trained.group_size}, and INT4 in groups of "
            f"{config.group_size} was asked for: leave group_size out, or undo_fake_quantise the model first"
        )
    refuse_unfit(model, config)
    return config


def _shards(model: Any, config: QuantisingConfig) -> list[list[Stored]]:
    """Return what is written, a shard a layer; a head that shares the embedding is left out."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    stored = stored_tensors(model, None, rounded_experts(model, config))
    return by_layer([one for one in stored if one.name != tied], model.config.num_hidden_layers)


def _write_config(model: Any, folder: Path, config: QuantisingConfig, drafting_layers: int) -> None:
    model.config.save_pretrained(folder)
    values = read_json(folder / CONFIG)
    values |= {"architectures": PUBLISHED["architectures"], "model_type": "deepseek_v3"}
    values["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    values["num_nextn_predict_layers"] = drafting_layers
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]  # engines with an older transformers read this one
    values["quantization_config"] = quantization_config(rounded_experts(model, config))
    write_json(folder / CONFIG, values)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _compare(shards: list[list[Stored]], folder: Path) -> None:
    """Read what was written, weight by weight, and raise :class:`ExportError` where a bit differs from the model."""
    checkpoint = check_checkpoint(folder)
    weights = open_weights(checkpoint.folder, checkpoint.files, checkpoint.storage)
    for one in (one for shard in shards for one in shard):
        meant = one.meant().cpu()
        if one.name not in weights or not torch.equal(weights[one.name][...].to(meant.dtype), meant):
            raise ExportError(f"{one.name} is not what was written: the disk may be damaged; export again")
