"""Wrap and adapt in one call; fold the adapter away for deployment."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pyra.backbones import locate, unwrap, wrap, wrapped_config
from pyra.config import PyraConfig
from pyra.errors import ConfigError

REACTIVATION = "reactivation"
# Modules that PEFT methods attach to when the configuration names none: the paper adapts the fused qkv.
_QUERIES_KEYS_VALUES = ("qkv", "q_proj", "k_proj", "v_proj")


def adapt(model: nn.Module, pyra: PyraConfig | None = None, peft: PeftConfig | None = None) -> nn.Module:
    """Make a backbone merge tokens and attach a PEFT method; everything else is frozen.

    Args:
        model: a supported backbone with its new task head (changed in place), or a ``PeftModel`` around one that is
            to merge from now on (``peft`` is then None).
        pyra: what to merge; None leaves the tokens alone.
        peft: any PEFT configuration; without ``target_modules`` it adapts the projections to queries, keys and values
            of the image encoder. The task head and the re-activation weights are trained and saved with it. None
            trains those alone (with ``pyra`` None as well: a linear probe).

    Returns:
        A ``peft.PeftModel`` around ``model``, or ``model`` itself for ``peft`` None.

    Raises:
        UnsupportedModelError, ScheduleError: from :func:`pyra.wrap`.
        ConfigError: where the target modules do not exist in the model or are of a kind the method cannot adapt, or
            ``modules_to_save`` reaches into the re-activation modules. The backbone is then as it was.

    Example:
        >>> model = adapt(model, pyra=PyraConfig(rate=0.5), peft=LoraConfig(r=8))  # doctest: +SKIP
    """
    if isinstance(model, PeftModel):
        if pyra is None or peft is not None:
            raise ConfigError(
                "this model already carries an adapter: give adapt() the backbone, fold_adapter it first, or give "
                "adapt() what it shall merge and no further PEFT method"
            )
        carry_reactivation(wrap(model, pyra))
        return model
    with undone_on_error(model):
        return _adapt(wrap(model, pyra) if pyra is not None else model, peft)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give a backbone back as it was where the block fails: not wrapped, its weights trainable as before."""
    wrapped = wrapped_config(model) is not None
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if not wrapped:
            unwrap(model)
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _adapt(model: nn.Module, peft: PeftConfig | None) -> nn.Module:
    trained = trained_modules(model)
    if peft is None:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if name in trained:
                module.requires_grad_(True)
        return model
    config = copy.deepcopy(peft)
    if getattr(config, "target_modules", "none to ask for") is None:
        config.target_modules = default_targets(model)
    saved = {name.rpartition(".")[2] if name.endswith(REACTIVATION) else name for name in trained}
    asked = set(getattr(config, "modules_to_save", None) or ())
    _refuse_inner_modules(model, asked)
    config.modules_to_save = sorted(asked | saved)
    if REACTIVATION in saved:
        _exclude_reactivation(config)
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, StopIteration) as error:
        wanted = getattr(config, "target_modules", None)
        if isinstance(error, StopIteration):  # peft looks for a weight in a module that has none
            raise ConfigError(f"target_modules {wanted}: a module of that name has no weights; name others") from None
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"peft cannot attach {type(config).__name__} to target_modules {wanted}: {reason}") from None
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = backbone_name(model)
    return adapted


def carry_reactivation(model: PeftModel) -> None:
    """Have PEFT train, save and switch re-activation modules that came after it, with the adapter that is active."""
    name = model.active_adapter
    config = model.peft_config[name]
    for parent in list(model.modules()):
        module = parent._modules.get(REACTIVATION)
        if module is not None and not isinstance(module, ModulesToSaveWrapper):
            wrapper = ModulesToSaveWrapper(module, name)
            wrapper.set_adapter(name)
            setattr(parent, REACTIVATION, wrapper)
            config.modules_to_save = sorted({*(config.modules_to_save or ()), REACTIVATION})
            _exclude_reactivation(config)


def _exclude_reactivation(config: PeftConfig) -> None:
    """Re-activation is trained whole, never through a PEFT layer."""
    if getattr(config, "exclude_modules", "") is None:
        config.exclude_modules = rf"(.*\.)?{REACTIVATION}(\..*)?"


def default_targets(model: nn.Module) -> list[str] | str:
    """Name the projections to queries, keys and values as PEFT's ``target_modules``: of the image encoder alone."""
    _, core = locate(model)
    inside = {id(module) for module in core.modules()}
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _QUERIES_KEYS_VALUES]
    names = sorted({name.rpartition(".")[2] for name, module in found if id(module) in inside})
    if all(id(module) in inside for _, module in found):
        return names
    path = next(name for name, module in model.named_modules() if module is core)
    return rf"{re.escape(path)}\..*\.({'|'.join(names)})"


def _refuse_inner_modules(model: nn.Module, asked: set[str]) -> None:
    """PEFT takes a name in ``modules_to_save`` for every module whose path ends with it, those of others included."""
    inside = [name for name, _ in model.named_modules() if f".{REACTIVATION}." in f".{name}."[:-1]]
    clashes = sorted({wanted for wanted in asked for name in inside if name.endswith(wanted)})
    if clashes:
        raise ConfigError(
            f"modules_to_save {', '.join(clashes)}: PEFT would also take {inside[0]} for it, which is trained anyway; "
            "name a longer path or another module"
        )


def fold_adapter(model: nn.Module) -> nn.Module:
    """Fold the PEFT layers into the weights (in place) and return the backbone: merging stays, peft is gone.

    What cannot be folded exactly (bottleneck adapters are not linear) becomes an ordinary part of its module. A model
    without PEFT layers is returned as it is.
    """
    if not isinstance(model, PeftModel):
        return model
    # Modules saved whole first: several tuners expect every such module to have a `weight`.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ModulesToSaveWrapper) and child.active_adapters:
                setattr(parent, name, child.modules_to_save[child.active_adapters[0]])
    folded: nn.Module = model.merge_and_unload()
    return folded


def trained_modules(model: nn.Module) -> list[str]:
    """Name the modules that train beside a PEFT method: the task head(s) and the re-activation modules."""
    plain: Any = getattr(model, "timm_model", model)  # transformers' wrapper of timm models
    if hasattr(plain, "get_classifier"):
        heads = plain.get_classifier()
        heads = list(heads) if isinstance(heads, (tuple, list)) else [heads]
    else:  # transformers: `classifier`, and DeiT's `cls_classifier` and `distillation_classifier`
        heads = [head for name, head in plain.named_children() if name.endswith("classifier")]
    heads = [head for head in heads if any(True for _ in head.parameters())]
    return [
        name
        for name, module in model.named_modules()
        if any(module is head for head in heads) or name.rpartition(".")[2] == REACTIVATION
    ]


def backbone_name(model: nn.Module) -> str | None:
    """Return the name of a timm model with its pretrained tag, or None."""
    source = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = source.get("architecture"), source.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture
