"""Fold the adapter away for deployment."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.several import settle
from pyra.errors import ConfigError


def fold_adapter(model: nn.Module) -> nn.Module:
    """Fold the PEFT layers into the weights (in place) and return the backbone: merging stays, peft is gone.

    What cannot be folded exactly (bottleneck adapters are not linear) becomes an ordinary part of its module. A model
    without PEFT layers is returned as it is, one that is folded already too.

    Args:
        model: from :func:`pyra.adapters.adapt`, :func:`pyra.adapters.load_adapter` or
            :func:`pyra.load_published_checkpoint`.

    Raises:
        ConfigError: for a method that has no weights to fold into (prompts), or that PEFT cannot fold into this model;
            the model is then as it was.
    """
    if not isinstance(model, PeftModel):
        _fold_injected(model)
        return model
    settle(model)
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        raise ConfigError(
            f"{kind} cannot be folded: it adds tokens or layers, which no weight can stand for; use the model as "
            "load_adapter returns it, or train a method that folds, such as LoraConfig"
        )
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with unchanged_on_error(model, altered=layers):
        # Modules saved whole first: several tuners expect every such module to have a `weight`.
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ModulesToSaveWrapper) and child.active_adapters:
                    setattr(parent, name, child.modules_to_save[child.active_adapters[0]])
        try:
            folded: nn.Module = model.merge_and_unload()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:  # as methods do
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{kind} cannot be folded into this model: {reason.rstrip('.')}; use the model unfolded, as "
                "load_adapter returns it, or train a method that folds, such as LoraConfig (the model is unchanged)"
            ) from None
    return folded


def _fold_injected(model: nn.Module) -> None:
    """Fold PEFT layers that are in a plain module, as ``load_published_checkpoint`` puts them there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
