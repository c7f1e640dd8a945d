"""``save_pretrained`` of a decoder that merges prompts, and the way back: ``config.json`` says what merges.

The folder is the plain model's, with re-activation weights among the others and the merging under the key
``pyra_prompts`` of ``config.json``. ``from_pretrained`` of transformers' Auto and model classes returns a merging model
once ``pyra`` is imported; without ``pyra`` it returns the plain one and reports re-activation weights as unexpected.
A model class asked for a name on the hub returns the plain model too: there the Auto classes know the configuration.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pyra.backbones.layers import REACTIVATION, merging_layers
from pyra.config import PyraConfig
from pyra.errors import ConfigError

KEY = "pyra_prompts"  # not "pyra", which images' exports have


def prepare_saving(model: Any, core: nn.Module) -> None:
    """Have the instance's ``save_pretrained`` note what merges."""
    model.save_pretrained = functools.partial(save_pretrained, model, core)


def restore_saving(model: Any) -> None:
    """Undo :func:`prepare_saving`."""
    model.__dict__.pop("save_pretrained", None)


def save_pretrained(model: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    """Save as the model's class does, with the merging in ``config.json``."""
    # Only for as long as this takes: a plain model may be made of the same configuration.
    setattr(model.config, KEY, core.pyra_config.to_dict())
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        delattr(model.config, KEY)


def register() -> None:
    """Make ``from_pretrained`` of transformers' models look for what merges."""
    original: Any = PreTrainedModel.from_pretrained
    if not hasattr(original.__func__, KEY):

        @functools.wraps(original.__func__)
        def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            merging = _merging(pretrained_model_name_or_path, kwargs)
            make = functools.partial(original.__func__, cls)
            if merging is not None:
                make = functools.partial(_opened, original.__func__, cls, merging)
            return make(pretrained_model_name_or_path, *args, **kwargs)

        setattr(from_pretrained, KEY, True)
        PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _merging(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a configuration, given or in a folder, says of merging; of a name on the hub only a given one."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        found = getattr(config, KEY, None)
    elif config is None and name is not None:
        try:
            values = json.loads((Path(name) / kwargs.get("subfolder", "") / "config.json").read_text(encoding="utf-8"))
        except (OSError, TypeError, ValueError):
            return None  # transformers says what is wrong
        found = values.get(KEY) if isinstance(values, dict) else None
    else:
        return None
    return found if isinstance(found, dict) and "version" in found else None


def _opened(load: Any, cls: Any, merging: dict[str, Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model whose layers merge before its weights are read, so that all have a place."""
    try:
        config = PyraConfig.from_dict(merging)
    except ConfigError as error:
        raise ConfigError(f"{name}: config.json, {KEY}: {error}") from None
    asked = kwargs.pop("output_loading_info", False)
    model, found = load(_making(cls, config), name, *args, output_loading_info=True, **kwargs)
    model.__class__ = cls
    _leave_out(model, found)
    return (model, found) if asked else model


def _making(cls: Any, merging: PyraConfig) -> Any:
    """Return a class that makes wrapped models of a class."""

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from pyra.backbones import wrap

        config.__dict__.pop(KEY, None)
        cls.__init__(self, config, *args, **kwargs)
        wrap(self, merging)

    return type(
        cls.__name__, (cls,), {"__init__": make, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def _leave_out(model: Any, found: dict[str, Any]) -> None:
    """Remove re-activation weights that were not stored: layers that :func:`pyra.set_rate` added merge without."""
    paths = {id(module): name for name, module in model.named_modules()}
    missing = set(found["missing_keys"])
    for layer in merging_layers(model):
        prefix = f"{paths[id(layer)]}.{REACTIVATION}."
        if any(key.startswith(prefix) for key in missing):
            del layer.reactivation
            found["missing_keys"] = {key for key in missing if not key.startswith(prefix)}
            missing = found["missing_keys"]


register()
