"""The tuner that puts prompts into an image encoder: plain vision transformers of timm and transformers."""

from __future__ import annotations

import inspect
import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from pyra.adapters.prompts.config import VisualPromptsConfig
from pyra.adapters.prompts.layer import PromptsLayer, VisualPrompts
from pyra.backbones import locate, wrapped_config
from pyra.errors import ConfigError

_SOURCES = ("norm_pre", "embeddings")  # where tokens come from: timm, transformers


class PromptsModel(BaseTuner):
    """PEFT tuner of visual prompts."""

    prefix: str = "prompt_"
    tuner_layer_cls = PromptsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's interface

    def _create_and_replace(
        self,
        peft_config: VisualPromptsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, PromptsLayer):
            raise ConfigError("a model can carry the visual prompts of one adapter: delete_adapter the other first")
        if wrapped_config(self.model) is not None:
            raise ConfigError("prompts come before merging: unwrap(model) first, and give adapt() both")
        family, core = locate(self.model)
        if parent is not core or target_name not in _SOURCES:
            raise ConfigError(f"target_modules {current_key}: tokens do not come from there; leave target_modules out")
        sizes, blocks = family.geometry(core, None), list(family.layers(core))
        weight = next(parameter for parameter in blocks[0].parameters() if parameter.is_floating_point())
        patches = next((m.weight for m in core.modules() if isinstance(m, nn.Conv2d)), weight)
        prompts = VisualPrompts(
            len(blocks) if peft_config.deep else 1,
            peft_config.num_prompts,
            sizes.dim,
            patches[0].numel(),
            sizes.prefix_tokens,
            peft_config.dropout,
            device=weight.device,
            dtype=weight.dtype,
        )
        deep = blocks[1:] if peft_config.deep else []
        layer = PromptsLayer(target, adapter_name, prompts, peft_config, core, deep)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, PromptsLayer) and not child.merged:
            child.detach()
        setattr(parent, child_name, new_module)


def prompt_target(model: nn.Module, core: nn.Module) -> str:
    """Name the module that an image encoder's tokens come from, as PEFT's ``target_modules``.

    Raises:
        ConfigError: where prompts have no place among the tokens, with the reason.
    """
    reason = _obstacle(core)
    if reason is not None:
        raise ConfigError(f"{type(core).__name__} takes no visual prompts: {reason}")
    source = next(name for name in _SOURCES if hasattr(core, name))
    path = next(name for name, module in model.named_modules() if module is core)
    return re.escape(f"{path}.{source}".lstrip("."))


def _obstacle(core: Any) -> str | None:
    if not any(isinstance(getattr(core, name, None), nn.Module) for name in _SOURCES):
        return "it has no place where class token and patches come together"
    if hasattr(core, "embeddings"):
        takes = inspect.signature(type(core.embeddings).forward).parameters
        strange = [name for name in takes if name in ("spatial_shapes", "noise")]
        return f"its embeddings take {strange[0]}, by which they choose or pad tokens" if strange else None
    if any(hasattr(module, "num_prefix_tokens") for block in core.blocks for module in block.modules()):
        return "its attention counts prefix tokens itself, for its rotary positions"
    if core.dynamic_img_size and core.pos_embed is not None and not core.no_embed_class:
        return "its positions are resized by its count of prefix tokens: create it with dynamic_img_size=False"
    return None
