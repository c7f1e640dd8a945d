"""``config.json`` for engines: the model's own, with the keys that engines and their older transformers look for."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from pyra.backbones.joyai import MODEL_TYPES
from pyra.errors import ExportError, UnsupportedModelError
from pyra.export.engine_names import DEEPSEEK, LLAMA_TYPES

_NOT_WRITTEN = ("head_dim", "qk_head_dim", "auto_map", "quantization_config", "_name_or_path", "pyra_prompts")
# What transformers computes whatever the configuration says, and engines ask the configuration for.
_COMPUTED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_LATENT_EPS = 1e-6  # of the norms of latents in transformers' DeepSeek-V3; engines take rms_norm_eps


def family_of(model: nn.Module) -> str:
    """Return the ``model_type`` that engines know a model by.

    Raises:
        UnsupportedModelError: for a model of another family, or one with a head that answers by labels.
    """
    name = type(model).__name__
    if not name.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{name} does not say which token comes next, which is what engines serve: export a decoder, or a run "
            "that was trained with --answer scoring or generation"
        )
    return family_named(getattr(getattr(model, "config", None), "model_type", None))


def family_named(kind: str | None) -> str:
    """Return the ``model_type`` that engines know another one by; raises as :func:`family_of` does."""
    if kind in MODEL_TYPES:
        return DEEPSEEK
    if kind not in LLAMA_TYPES:
        known = ", ".join((*MODEL_TYPES, *LLAMA_TYPES))
        raise UnsupportedModelError(f"a model of type {kind} is not written for engines; {known} are")
    return kind


def engine_values(model: nn.Module, dtype: str, mtp_layers: int) -> dict[str, Any]:
    """Return what ``config.json`` says.

    Args:
        model: folded, nothing merging.
        dtype: of the weights, such as ``bfloat16``.
        mtp_layers: MTP layers whose weights are written.

    Raises:
        ExportError: for a configuration that engines compute otherwise than transformers.
        UnsupportedModelError: as of :func:`family_of`.
    """
    family, config = family_of(model), getattr(model, "config")  # noqa: B009
    values: dict[str, Any] = json.loads(config.to_json_string())  # without what every configuration has
    values["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    leave_out = _NOT_WRITTEN if family == DEEPSEEK else _NOT_WRITTEN[2:]
    values = {key: value for key, value in values.items() if key not in leave_out}
    values |= {"model_type": family, "dtype": dtype, "torch_dtype": dtype} | _rope(values)
    if family == DEEPSEEK:
        _refuse_other_sums(config)
        values |= _COMPUTED | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_nextn_predict_layers": mtp_layers,
            "n_routed_experts": config.n_routed_experts,
            "tie_word_embeddings": False,  # engines have a head of its own here: it is written
        }
        values.pop("num_mtp_layers", None)
        values.pop("num_local_experts", None)
    else:
        values["architectures"] = [type(model).__name__]
    return values


def _refuse_other_sums(config: Any) -> None:
    if not config.rope_interleave:
        raise ExportError("rope_interleave is false: engines rotate neighbouring channels of deepseek_v3 together")
    if config.rms_norm_eps != _LATENT_EPS:
        raise ExportError(
            f"rms_norm_eps is {config.rms_norm_eps:g}: engines norm latents by it, transformers by {_LATENT_EPS:g}, "
            f"and answers would differ; only {_LATENT_EPS:g} is written"
        )


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Say how positions rotate in both ways: transformers 5's ``rope_parameters``, and the two keys before it."""
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    scaled = None if kind == "default" else {"type": kind, "rope_type": kind, **given}
    parameters = {"rope_theta": theta, "rope_type": kind, **given}
    return {"rope_theta": theta, "rope_parameters": parameters, "rope_scaling": scaled}
