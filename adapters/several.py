"""Several adapters on one backbone, each with its own rate: one is active, and switching loads nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pyra.adapters.adapting import carry_reactivation
from pyra.adapters.bottleneck import BottleneckConfig
from pyra.adapters.fetching import local_folder
from pyra.adapters.fit import check_backbone, check_fit
from pyra.adapters.folder import StoredAdapter, one_line, read_adapter
from pyra.adapters.peft_model import saving_merging
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.rounded_lora import round_with_adapter
from pyra.adapters.starts import changes_weights
from pyra.adapters.targets import REACTIVATION
from pyra.backbones import (
    geometry,
    schedule_of,
    switch,
    wrap,
    wrapped_config,
    wrapped_schedule,
)
from pyra.backbones.layers import give_reactivation, merging_layers
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError, PyraError

_STILL = PyraConfig(rate=0.0, reactivation=False)  # what an adapter without merging does


_RESERVED = ("modules_to_save", "original_module", "base_layer")  # names inside PEFT's layers


def add_adapter(model: nn.Module, folder: str | Path, name: str) -> nn.Module:
    """Load a further adapter into a model that has one; the active one stays active.

    Args:
        model: from :func:`pyra.adapters.adapt` or :func:`pyra.adapters.load_adapter`, with a PEFT method.
        folder: as for :func:`pyra.adapters.load_adapter`, from a backbone of the same width and depth, with a head
            of the same size. It may merge at another rate, or not at all.
        name: what it is called here.

    Returns:
        ``model``.

    Raises:
        ConfigError: where the model has no PEFT method, the name is taken, or the adapter cannot be one of several.
        CheckpointError: where the folder holds no readable adapter, or one that does not fit.

    After each of them the model is as it was.

    Example:
        >>> add_adapter(model, "fast_adapter", "fast")  # doctest: +SKIP
        >>> switch_adapter(model, "fast")  # doctest: +SKIP
    """
    if not isinstance(model, PeftModel):
        raise ConfigError("add_adapter needs a model that has an adapter: use load_adapter for the first")
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
        raise ConfigError(f"an adapter is called by a word of letters, digits and _, got {name!r}")
    if name in model.peft_config:
        raise ConfigError(f"the model has an adapter {name!r} already: {', '.join(model.peft_config)}")
    settle(model)
    configs, known = copy.deepcopy(model.peft_config), {id(module) for module in model.modules()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        stored = read_adapter(local_folder(folder))
        _refuse(stored, model)
        with unchanged_on_error(model):
            _add(model, stored, name)
    except BaseException as error:
        for key, config in configs.items():
            model.peft_config[key].__dict__.update(config.__dict__)
        if isinstance(error, PyraError):
            raise type(error)(f"{error} (the model is as it was)") from None
        raise
    for module in model.modules():
        if id(module) not in known:  # what came with the adapter, which is not the active one
            module.training = model.training
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    for parameter, flag in trained:
        parameter.requires_grad_(flag)
    return model


def switch_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make another adapter of a model the active one, with its re-activation weights, its head and its rate.

    What :func:`pyra.set_rate` chose for an adapter is kept for it. After :func:`pyra.unwrap` none merges any more.

    Args:
        model: with adapters from :func:`add_adapter`.
        name: of the adapter; the first is called ``"default"``.

    Returns:
        ``model``.

    Raises:
        ConfigError: where the model has no such adapter.

    ``model.set_adapter`` does the same, and like PEFT's own makes the adapter trainable; here one that is frozen stays
    so. What ``delete_adapter`` does is put right by the next call here, and when the adapter is saved.
    """
    names = list(model.peft_config) if isinstance(model, PeftModel) else []
    if name not in names:
        raise ConfigError(f"the model has no adapter {name!r}; it has {', '.join(names) or 'none'}")
    assert isinstance(model, PeftModel)
    note_rate(model)
    model.set_adapter(name, inference_mode=not _trains(model))
    apply_rate(model, name)
    return model


def note_rate(model: PeftModel) -> None:
    """Keep the rate of the active adapter for its return."""
    settle(model)
    if wrapped_config(model) is not None:
        _states(model)[model.active_adapter] = (wrapped_config(model), wrapped_schedule(model))


def share_rate(model: nn.Module, name: str) -> None:
    """Have a further adapter merge as the active one does: one that PEFT itself has added would merge nothing."""
    if isinstance(model, PeftModel) and wrapped_config(model) is not None:
        note_rate(model)
        _states(model)[name] = _states(model)[model.active_adapter]


def _trains(module: nn.Module) -> bool:
    """Whether any parameter requires a gradient; ``parameters()`` takes ten times as long, as it looks for twins."""
    own = any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())
    return own or any(child is not None and _trains(child) for child in module._modules.values())


def settle(model: nn.Module) -> None:
    """Bring the rate in line with the active adapter, where PEFT's own calls switched or deleted adapters since."""
    if not isinstance(model, PeftModel) or "pyra_adapters" not in model.__dict__:
        return
    states = _states(model)
    gone = states if wrapped_config(model) is None else [name for name in states if name not in model.peft_config]
    for name in list(gone):  # unwrapped, or deleted
        del states[name]
    if wrapped_config(model) is None:
        model.__dict__["pyra_active"] = model.active_adapter
    if model.__dict__.get("pyra_active") != model.active_adapter:
        apply_rate(model, model.active_adapter)


def merging_of(model: PeftModel, name: str) -> tuple[PyraConfig | None, list[int] | None]:
    """Return what merges with one of the adapters of a model that is settled, and its schedule.

    None where the model merges nothing with any; re-activation weights that nothing reads may belong to an adapter
    beside others, whose configuration then says that it merges nothing.
    """
    active = wrapped_config(model)
    if name == model.active_adapter or active is None:
        return active, wrapped_schedule(model)
    config, schedule = _states(model).get(name, (None, None))
    return (_STILL, [0] * geometry(model).depth) if config is None else (config, schedule)


def apply_rate(model: PeftModel, name: str) -> None:
    """Merge as one of the adapters does, which is active."""
    config, schedule = _states(model).get(name, (None, None))
    if config is not None and schedule is not None:
        switch(model, config, schedule)
    elif wrapped_config(model) is not None:
        switch(model, _STILL, [0] * geometry(model).depth)
    model.__dict__["pyra_active"] = name


def _states(model: PeftModel) -> dict[str, tuple[PyraConfig | None, list[int] | None]]:
    """What merges with each adapter, as far as it is not the active one."""
    states: dict[str, tuple[PyraConfig | None, list[int] | None]] = model.__dict__.setdefault("pyra_adapters", {})
    return states


def _refuse(stored: StoredAdapter, model: PeftModel) -> None:
    peft, own = stored.peft, list(model.peft_config.values())
    if peft is None:
        raise ConfigError(f"{stored.folder} was trained without a PEFT method, and cannot be one of several")
    if any(isinstance(config, VisualPromptsConfig) for config in (peft, *own)):
        raise ConfigError("visual prompts change the number of tokens: they cannot be one of several adapters")
    shared = [c for c in (peft, *own) if getattr(c, "bias", "none") not in (None, False, "none")]
    if shared:
        raise ConfigError(f"{type(shared[0]).__name__}(bias={shared[0].bias!r}) trains biases that all adapters share")
    if any(isinstance(config, BottleneckConfig) for config in (peft, *own)):
        raise ConfigError("a bottleneck adapter cannot be one of several: fold_adapter makes it a part of the model")
    round_with_adapter(model, peft)
    if changes_weights(peft):
        raise ConfigError(
            f"{stored.folder} starts from changed weights of the backbone ({type(peft).__name__}, saved by stock "
            "peft): load it alone"
        )


def _add(model: PeftModel, stored: StoredAdapter, name: str) -> None:
    base, active = model.get_base_model(), model.active_adapter
    before = (wrapped_config(model), wrapped_schedule(model))
    if stored.pyra is not None:
        check_backbone(base, stored)
        if before[0] is None:
            wrap(model, _STILL)
        switch(model, stored.pyra, schedule_of(base, stored.pyra))
        _make_room(model, stored)
    try:
        model.add_adapter(name, stored.peft)
    except PyraError:
        raise
    except Exception as error:  # the file may ask for anything, and peft raises what comes up
        raise CheckpointError(f"{stored.folder} does not fit this backbone: {one_line(error)}") from None
    _take_stored_lengths(model, stored, name)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Layers that merge with another adapter alone have re-activation weights here that nothing reads.
    check_fit(base, own, stored, {key for key in own if f".{REACTIVATION}." not in key or key in stored.weights})
    set_peft_model_state_dict(model, own | stored.weights, adapter_name=name)
    saving_merging(model)
    states = _states(model)
    states[name] = (wrapped_config(model), wrapped_schedule(model)) if stored.pyra is not None else (None, None)
    states[active] = before
    apply_rate(model, active)


def _make_room(model: PeftModel, stored: StoredAdapter) -> None:
    """Give layers that merge with the new adapter alone the modules that its re-activation weights go to."""
    paths, made = {id(module): path for path, module in model.get_base_model().named_modules()}, []
    for layer in merging_layers(model):
        start = stored.reactivation_of(paths[id(layer)])
        if start is not None and not hasattr(layer, REACTIVATION):
            give_reactivation(layer, len(stored.weights[f"{start}pair_weight"]))
            made.append(layer)
    carry_reactivation(model)
    for layer in made:  # the adapter that is active merges nothing there
        layer.reactivation.requires_grad_(False)


def _take_stored_lengths(model: PeftModel, stored: StoredAdapter, name: str) -> None:
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and path.rpartition(".")[2] == REACTIVATION:
            start = stored.reactivation_of(path.rpartition(".")[0])
            if start is None or name not in module.modules_to_save:
                continue
            mine, rows = module.modules_to_save[name], stored.weights[f"{start}pair_weight"]
            if rows.shape[1:] == mine.pair_weight.shape[1:]:  # what does not fit is told with the rest
                mine.pair_weight = nn.Parameter(torch.zeros_like(rows, dtype=mine.pair_weight.dtype))
