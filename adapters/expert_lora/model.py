"""The tuner that puts :class:`ExpertLoraLayer` around experts, and ordinary LoRA elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pyra.adapters.expert_lora.config import PROJECTIONS, ExpertLoraConfig
from pyra.adapters.expert_lora.layer import ALIGNED, ExpertLoraLayer
from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.layers import expert_layers, layer_number

_OTHER_LAYOUTS = {"is_transposed": "transposed weights", "has_bias": "biases", "has_post_expert_norm": "norms"}


class ExpertLoraModel(LoraModel):
    """PEFT tuner of LoRA on experts; what ``target_modules`` and ``target_parameters`` name is stock LoRA's."""

    tuner_layer_cls = BaseTunerLayer  # of both kinds
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's interface
    _places: dict[str, Tensor]

    def _prepare_adapter_config(self, peft_config: ExpertLoraConfig, model_config: dict[str, Any]) -> ExpertLoraConfig:
        self._places = adapted_experts(self.model, peft_config)
        stacks = expert_targets(self.model, peft_config)
        if stacks:
            raise ConfigError(
                f"target_parameters {', '.join(stacks)}: these are the experts that this method adapts anyway"
            )
        if peft_config.target_modules is None:
            peft_config.target_modules = set()
        missing = _missing_targets(self.model, peft_config.target_modules)
        if missing:  # PEFT says so only where nothing at all is adapted
            raise ConfigError(f"target_modules {', '.join(missing)}: the model has no such module")
        return peft_config

    def _check_target_module_exists(self, peft_config: ExpertLoraConfig, key: str) -> Any:
        return key in self._places or LoraModel._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        lora_config: ExpertLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        if current_key not in self._places:
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **options)
            return
        index = self._places[current_key]
        if isinstance(target, ExpertLoraLayer):
            target.update_layer(adapter_name, lora_config, index)
            return
        if isinstance(target, BaseTunerLayer):
            raise ConfigError(f"{current_key} carries another adapter: fold_adapter it first")
        layer = ExpertLoraLayer(target, adapter_name, lora_config, index)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("experts take no adapter of its own for each row of a batch: leave adapter_names out")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: stock LoRA would leave the experts out."""
        raise ConfigError("adapters on experts cannot be combined into a new one: activate several, or fold them")


def adapted_experts(model: nn.Module, config: ExpertLoraConfig) -> dict[str, Tensor]:
    """Return which experts are adapted, ascending [M], by the names of the modules that hold them.

    Raises:
        UnsupportedModelError: for a model without routed experts, or with experts of another layout.
        ConfigError: for layers without experts, or experts that a layer does not have, all named.
    """
    mixtures = expert_layers(model, through_adapters=True)
    numbers = {name: str(layer_number(name)) for name in mixtures}
    wanted = {str(layer) for layer in config.layers} if config.layers is not None else set(numbers.values())
    named = set(config.experts) if isinstance(config.experts, dict) else set()
    unknown = sorted((wanted - set(numbers.values())) | (named - set(numbers.values()) - set(numbers)))
    problems = [f"layer {layer} has no routed experts" for layer in unknown]
    found = {}
    for name, mixture in mixtures.items():
        experts = mixture.experts.get_base_layer() if isinstance(mixture.experts, BaseTunerLayer) else mixture.experts
        chosen = _chosen(config, name, numbers[name], len(experts.gate_up_proj))
        if numbers[name] not in wanted or chosen is None:
            continue
        _refuse_other_layouts(f"{name}.experts", experts)
        if max(chosen) >= len(experts.gate_up_proj):
            problems.append(f"{name} has no expert {max(chosen)}, of {len(experts.gate_up_proj)}")
        found[f"{name}.experts"] = torch.tensor(sorted(chosen))
    if not problems and not found:
        problems = ["layers and experts have no layer in common"]
    if problems:
        have = ", ".join(numbers.values())
        raise ConfigError(f"ExpertLoraConfig: {'; '.join(problems)} (layers with experts: {have})")
    return found


def _missing_targets(model: nn.Module, wanted: Iterable[str] | str) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):
        return [] if wanted == "all-linear" or any(re.fullmatch(wanted, name) for name in names) else [wanted]
    return sorted(target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names))


def _chosen(config: ExpertLoraConfig, name: str, number: str, count: int) -> Iterable[int] | None:
    if isinstance(config.experts, dict):
        return config.experts.get(name, config.experts.get(number))
    return range(count) if config.experts is None else config.experts


def _refuse_other_layouts(name: str, experts: Any) -> None:
    other = [text for flag, text in _OTHER_LAYOUTS.items() if getattr(experts, flag, False)]
    if not getattr(experts, "has_gate", True):
        other.append("no gates")
    if getattr(experts, "_is_expert_parallel", False):
        other.append("experts on other processes")
    stacks = [getattr(experts, projection) for projection in PROJECTIONS]
    if any(not stack.is_floating_point() or stack.element_size() < 2 for stack in stacks):
        other.append(f"weights of {stacks[0].dtype}")
    rows = [stack.shape[-1] * stack.element_size() for stack in stacks]
    other += [f"rows of {count} bytes, no multiple of {ALIGNED}" for count in rows if count % ALIGNED]
    if other:
        raise UnsupportedModelError(f"{name} has {', '.join(other)}, which LoRA on experts does not cover")


def expert_targets(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """Return the stacks of experts that ``target_parameters`` of a LoRA configuration names, by name."""
    wanted = tuple(config.target_parameters or ())
    try:
        mixtures = expert_layers(model, through_adapters=True) if wanted else {}
    except UnsupportedModelError:
        return {}
    stacks: dict[str, Tensor] = {}
    for name, mixture in mixtures.items():
        experts = mixture.experts.get_base_layer() if isinstance(mixture.experts, BaseTunerLayer) else mixture.experts
        stacks |= {f"{name}.experts.{projection}": getattr(experts, projection) for projection in PROJECTIONS}
    return {key: stack for key, stack in stacks.items() if f".{key}".endswith(tuple(f".{name}" for name in wanted))}
