"""Attach a saved adapter to a fresh backbone."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pyra.adapters.adapting import carry_reactivation
from pyra.adapters.fetching import local_folder
from pyra.adapters.fit import check_backbone, check_fit
from pyra.adapters.folder import StoredAdapter, one_line, read_adapter
from pyra.adapters.peft_model import saving_merging
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.rounded_lora import round_with_adapter
from pyra.adapters.starts import changes_weights
from pyra.adapters.targets import REACTIVATION, trained_modules
from pyra.backbones import wrap
from pyra.backbones.layers import give_reactivation, merging_layers
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError, PyraError, ScheduleError


def load_adapter(
    base: nn.Module, folder: str | Path, *, revision: str | None = None, is_trainable: bool = False
) -> nn.Module:
    """Attach a saved adapter to a fresh backbone of the same width and depth.

    Merging, PEFT layers, re-activation weights and head are restored. The backbone may have another token count: a
    rate is solved anew, and re-activation weights keep the length they were stored with. A layer that merges at the new
    token count, but has no stored weights, merges plainly, and a warning says so.

    Args:
        base: the backbone with its pretrained weights and a head of the right size (changed in place).
        folder: written by :func:`pyra.adapters.save_adapter`, by ``save_pretrained`` or by stock peft; or
            ``"owner/name"`` on the hub, of which weights and configuration are fetched, no code.
        revision: branch, tag or commit on the hub.
        is_trainable: let what was trained go on training; otherwise everything is frozen.

    Returns:
        The model as :func:`pyra.adapters.adapt` returns it, in evaluation mode.

    Raises:
        CheckpointError: for a folder that holds no readable adapter (the file is named), one that a newer version
            wrote (its unknown keys are named), a backbone of other width or depth, or tensors that do not fit, are
            missing, have no place or hold NaN (named).
        ScheduleError: where the schedule does not fit the backbone's token count.
        ConfigError: where ``base`` already carries an adapter.
        UnsupportedModelError: where the adapter merges and the backbone cannot.

    After each of them the backbone is as it was.
    """
    if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ConfigError(
            "this model already carries an adapter: give load_adapter the backbone, or fold_adapter first"
        )
    try:
        stored = read_adapter(local_folder(folder, revision))
        starts_anew = stored.peft is not None and changes_weights(stored.peft)  # PiSSA and the like, by stock peft
        with unchanged_on_error(base, altered=[base] if starts_anew else []):
            return _attach(base, stored, is_trainable).eval()
    except PyraError as error:
        raise type(error)(f"{error} (the backbone is as it was)") from None


def _attach(base: nn.Module, stored: StoredAdapter, trains: bool) -> nn.Module:
    prompted = isinstance(stored.peft, VisualPromptsConfig)  # its tokens are to be counted when the model is wrapped
    if stored.pyra is not None and not prompted:
        _merge(base, stored, stored.pyra)
    if stored.peft is None:
        modules = dict(base.named_modules())
        needed = {f"{name}.{key}" for name in trained_modules(base) for key in modules[name].state_dict()}
        check_fit(base, base.state_dict(), stored, needed)
        base.load_state_dict(stored.weights, strict=False)
        base.requires_grad_(False)
        for name in trained_modules(base) if trains else ():
            modules[name].requires_grad_(True)
        return base
    config = stored.peft
    round_with_adapter(base, config)
    try:
        config.inference_mode = not trains
        origin, config.base_model_name_or_path = config.base_model_name_or_path, None
        model = get_peft_model(base, config)  # puts None there for models that are not transformers', with a warning
        config.base_model_name_or_path = origin
    except PyraError:
        raise
    except Exception as error:  # the file may ask for anything, and peft raises what comes up
        raise CheckpointError(f"{stored.folder} does not fit this backbone: {one_line(error)}") from None
    saving_merging(model)
    if stored.pyra is not None and prompted:
        _merge(base, stored, stored.pyra)
        carry_reactivation(model)
        if not trains:
            model.requires_grad_(False)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_fit(base, own, stored, set(own))
    set_peft_model_state_dict(model, stored.weights)
    return model


def _merge(base: nn.Module, stored: StoredAdapter, config: PyraConfig) -> None:
    check_backbone(base, stored)
    try:
        wrap(base, config)
    except ScheduleError as error:
        raise ScheduleError(f"{stored.folder}: this backbone has another token count: {error}") from None
    _match_stored(base, stored)


def _match_stored(model: nn.Module, stored: StoredAdapter) -> None:
    """Have a re-activation module, of the stored length, in each layer that has stored weights, and in no other.

    The rate may be another than the one of the training, and the token count: layers without stored weights merge
    plainly, and those of layers that do not merge here are left out.
    """
    paths, plain, placed = {id(module): path for path, module in model.named_modules()}, [], set()
    for layer in merging_layers(model):
        start = stored.reactivation_of(paths[id(layer)])
        if start is None:
            if hasattr(layer, REACTIVATION):
                del layer.reactivation
                plain += [str(layer.step.layer)] if layer.step.removed else []
            continue
        placed.add(start)
        rows = stored.weights[f"{start}pair_weight"]
        if rows.ndim == 2 and len(rows) and rows.shape[1] == 1:  # what does not fit is told with the rest
            give_reactivation(layer, len(rows))
    starts = {key.removesuffix("pair_weight") for key in stored.weights if key.endswith(f".{REACTIVATION}.pair_weight")}
    for key in [key for key in stored.weights if any(key.startswith(start) for start in starts - placed)]:
        del stored.weights[key]
    if starts and plain:
        warnings.warn(
            f"{stored.folder} has no re-activation weights for layers {', '.join(plain)}, which merge in this model: "
            f"they merge plainly (it was trained with the schedule {stored.schedule})",
            stacklevel=2,
        )
