"""``engine``: a folder of safetensors that vLLM, SGLang and llama.cpp read, and stock transformers, too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyra.backbones.joyai_checkpoint import CONFIG, check_checkpoint
from pyra.backbones.joyai_mtp_weights import stored_mtp, without_mtp
from pyra.errors import CheckpointError, ExportError
from pyra.experts.quantising import rounded
from pyra.export.engine_check import check_engine_folder
from pyra.export.engine_config import engine_values, family_of
from pyra.export.engine_names import DEEPSEEK
from pyra.export.engine_rounding import Rounding, int4_rounding, quantization_config
from pyra.export.engine_tokenizer import write_tokenizer
from pyra.export.engine_weights import SHARD, by_size, stored_tensors, write_weights
from pyra.export.language import LanguageModel, Reloaded, Written, row_logits
from pyra.files import write_json

_NO_MTP = "no weights for multi-token prediction: num_nextn_predict_layers is 0"
_OTHER_EXPERTS = "the MTP layer has another number of experts than the model now has: it was left out"
_DENSE_MTP = (
    "the MTP layer is dense: an engine that expects experts in it serves the model, and drafts without that layer"
)


def write(subject: LanguageModel, folder: Path, weights: str, *, shard: int = SHARD) -> Written:
    """Write configuration, weights and tokenizer, and hold them against each engine's list."""
    model: Any = subject.model
    rounding = _rounding(subject, weights)
    dtype = _dtype(subject, weights)
    drafting, mtp = _mtp(subject, dtype)
    values = engine_values(model, str(dtype).removeprefix("torch."), mtp["layers"])
    if rounding is not None:
        values["quantization_config"] = quantization_config(rounding)
    stored = stored_tensors(model, dtype, rounding)
    write_weights(by_size(stored, shard), folder, drafting)
    write_json(folder / CONFIG, values)
    tokenizer = write_tokenizer(subject.tokenizer, subject.files, model, folder)
    engines = check_engine_folder(folder)
    notes = [*(rounding.notes if rounding else ()), *([] if tokenizer["same_ids"] else [_OTHER_START])]
    return Written(values["model_type"], sum(one.value.numel() for one in stored), engines, mtp, tokenizer, notes)


def _dtype(subject: LanguageModel, weights: str) -> torch.dtype:
    """Return what floats are written in: beside INT4, what the backbone's own are."""
    found: torch.dtype = getattr(torch, subject.dtype if weights == "int4" else weights)
    return found


def _rounding(subject: LanguageModel, weights: str) -> Rounding | None:
    """Return what is rounded, raising as :func:`int4_rounding` does; None for floats."""
    return int4_rounding(subject.model, subject.group) if weights == "int4" else None


_OTHER_START = (
    "transformers begins a text otherwise than the tokenizer that the model was trained with (BOS): give engines the "
    "ids, or a chat template that writes it"
)


def _mtp(subject: LanguageModel, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of MTP layers of the checkpoint that the model is of, and what the record says of them."""
    if subject.mtp is None or family_of(subject.model) != DEEPSEEK:
        return {}, {"layers": 0, **({"note": _NO_MTP} if family_of(subject.model) == DEEPSEEK else {})}
    checkpoint = check_checkpoint(subject.mtp)
    model: Any = subject.model
    if not checkpoint.mtp:
        return {}, {"layers": 0, "note": _NO_MTP}
    mixed = any(".experts." in name for name in checkpoint.mtp)
    if mixed and checkpoint.config.n_routed_experts != model.config.n_routed_experts:
        return {}, {"layers": 0, "note": _OTHER_EXPERTS}
    weights = stored_mtp(checkpoint, model)
    cast = {
        name: value.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype).contiguous()
        for name, value in weights.items()
    }
    told = {"layers": checkpoint.config.num_nextn_predict_layers, "of": checkpoint.folder.name}
    return cast, told if mixed else {**told, "note": _DENSE_MTP}


def reload(subject: LanguageModel, folder: Path, weights: str, rows: Sequence[Sequence[int]]) -> Reloaded:
    """Open the folder in transformers' own classes, in float32.

    Raises:
        ExportError: where that fails, or a weight is not the model's, rounded.
    """
    with redirect_stderr(io.StringIO()):  # compressed-tensors shows bars, which nothing turns off
        return _reload(subject, folder, weights, rows)


def _reload(subject: LanguageModel, folder: Path, weights: str, rows: Sequence[Sequence[int]]) -> Reloaded:
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, CheckpointError) as error:
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"transformers cannot open what was written ({said}); nothing was written") from None
    if told["missing_keys"] or told["mismatched_keys"]:
        odd = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
        raise ExportError(f"transformers misses {odd[0]} and {len(odd) - 1} more in what was written")
    if not type(model).__module__.startswith("transformers."):
        raise ExportError(f"the folder opens as {type(model).__module__}.{type(model).__name__}, not as a stock model")
    logits = row_logits(model.eval(), rows)  # where transformers unpacks the integers of linear layers
    difference = _weight_difference(subject, model, weights)
    if difference:
        raise ExportError(f"a weight that was read back is {difference:.3g} from the model's; nothing was written")
    return Reloaded(f"transformers {type(model).__name__}", logits, difference)


def _weight_difference(subject: LanguageModel, found: Any, weights: str) -> float:
    """Return the largest difference of a weight from the model's, cast or rounded to what was written."""
    rounding, dtype = _rounding(subject, weights), _dtype(subject, weights)
    theirs, largest = found.state_dict(), 0.0
    for name, value in without_mtp(subject.model.state_dict()).items():
        if rounding is not None and name in rounding.weights:
            own = rounded(value.detach(), rounding.config)
        else:
            own = value.detach().to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        largest = max(largest, float((own.float().cpu() - theirs[name].float()).abs().max()))
    return largest
