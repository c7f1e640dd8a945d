"""What a PEFT method attaches to, and what trains beside it, where the configuration leaves that open."""

from __future__ import annotations

import re
from typing import Any

from peft import IA3Config, LNTuningConfig, OFTConfig, PeftConfig, TrainableTokensConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as LNTUNING_TARGETS
from torch import nn

from pyra.adapters.expert_lora import ExpertLoraConfig
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.prompts.model import prompt_target
from pyra.backbones import is_decoder, locate
from pyra.backbones.layers import REACTIVATION as REACTIVATION
from pyra.errors import ConfigError, UnsupportedModelError

# The paper adapts the fused qkv (arXiv 2403.09192, section 4).
_QUERIES_KEYS_VALUES = ("qkv", "q_proj", "k_proj", "v_proj")
# Multi-head latent attention, which PEFT has no choice for; the routed experts are no linear layers.
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
IN_FOUR = "kv_b_proj"
"""Of these the one whose input is [B, 1, N, C]."""
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def fill_in_targets(config: PeftConfig, model: nn.Module) -> None:
    """Set ``target_modules`` (in place) where it is None and the model an image model; PEFT knows most language models.

    Norm tuning takes the norms of the image encoder, prompts the place where its tokens come from, every other method
    the projections to queries, keys and values. (IA)3 rescales those alone: none of them feeds an MLP. Of
    latent attention (JoyAI, DeepSeek-V3), which PEFT has no choice for, it takes all projections.

    Raises:
        ConfigError: for visual prompts, where the model has no place for them.
    """
    if getattr(config, "target_modules", "none to ask for") is not None or getattr(config, "target_parameters", None):
        return
    if isinstance(config, TrainableTokensConfig):
        return
    try:
        if is_decoder(model):
            raise UnsupportedModelError(f"{type(model).__name__} reads input_ids, not images")
        _, core = locate(model)
    except UnsupportedModelError as error:
        if isinstance(config, VisualPromptsConfig):
            raise ConfigError(f"visual prompts need an image encoder that could merge: {error}") from None
        if isinstance(config, LNTuningConfig) and _kind(model) not in LNTUNING_TARGETS:  # BERT and its kin
            config.target_modules = norm_targets(model, model) or None
        elif not isinstance(config, ExpertLoraConfig) and (names := latent_targets(model)):
            # OFT of peft takes the four dimensions of its input for those of images.
            config.target_modules = (
                [name for name in names if name != IN_FOUR] if isinstance(config, OFTConfig) else names
            )
            if isinstance(config, IA3Config) and config.feedforward_modules is None:
                config.feedforward_modules = []
        return
    if isinstance(config, VisualPromptsConfig):
        config.target_modules = prompt_target(model, core)
        return
    if isinstance(config, LNTuningConfig):
        config.target_modules = norm_targets(model, core)
        return
    config.target_modules = projection_targets(model, core)
    if isinstance(config, IA3Config) and config.feedforward_modules is None:
        config.feedforward_modules = []


def _kind(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def projection_targets(model: nn.Module, core: nn.Module) -> list[str] | str:
    """Name the projections to queries, keys and values as PEFT's ``target_modules``: of the image encoder alone."""
    inside = {id(module) for module in core.modules()}
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _QUERIES_KEYS_VALUES]
    names = sorted({name.rpartition(".")[2] for name, module in found if id(module) in inside})
    if all(id(module) in inside for _, module in found):
        return names
    path = next(name for name, module in model.named_modules() if module is core)
    return rf"{re.escape(path)}\..*\.({'|'.join(names)})"


def latent_targets(model: nn.Module) -> list[str]:
    """Name the projections of multi-head latent attention (DeepSeek-V3, JoyAI); none where a model has none."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(names.intersection(_LATENT)) if "kv_a_proj_with_mqa" in names else []


def norm_targets(model: nn.Module, core: nn.Module) -> str:
    """Name the image encoder's norms as a regular expression: a bare ``norm`` would also name modules without weights.

    Norms of re-activation are left out: they are trained whole.
    """
    inside = {id(module) for module in core.modules()}
    found = {
        re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
        for name, module in model.named_modules()
        if _is_norm(module) and id(module) in inside and f".{REACTIVATION}." not in f".{name}"
    }
    return "|".join(sorted(found))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__.endswith("RMSNorm")  # each model of transformers has its


def trained_modules(model: nn.Module) -> list[str]:
    """Name the modules that train beside a PEFT method: the task head(s) and the re-activation modules."""
    plain: Any = getattr(model, "timm_model", model)  # transformers' wrapper of timm models
    if hasattr(plain, "get_classifier"):
        heads = plain.get_classifier()
        heads = list(heads) if isinstance(heads, (tuple, list)) else [heads]
    else:  # transformers: `classifier`, DeiT's `cls_classifier` and `distillation_classifier`, `score` of decoders
        heads = [head for name, head in plain.named_children() if name.endswith("classifier") or name == "score"]
    heads = [head for head in heads if any(True for _ in head.parameters())]
    return [
        name
        for name, module in model.named_modules()
        if any(module is head for head in heads) or name.rpartition(".")[2] == REACTIVATION
    ]
