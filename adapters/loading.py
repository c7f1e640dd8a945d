"""Attach a saved adapter to a fresh backbone."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from pyra.adapters.adapt import carry_reactivation
from pyra.adapters.fit import check_backbone, check_fit, check_merging
from pyra.adapters.folder import StoredAdapter, one_line, read_adapter
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.starts import changes_weights
from pyra.adapters.targets import REACTIVATION, trained_modules
from pyra.backbones import wrap
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError, PyraError, ScheduleError


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Attach a saved adapter to a fresh backbone of the same width and depth.

    Merging, PEFT layers, re-activation weights and head are restored. The backbone may have another token count: a
    rate is solved anew, and re-activation weights keep the length they were stored with. Where other blocks merge at
    the new token count than those that have stored weights, the adapter is refused.

    Args:
        base: the backbone with its pretrained weights and a head of the right size (changed in place).
        folder: written by :func:`pyra.adapters.save_adapter`, or by stock peft.

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
    if isinstance(base, PeftModel):
        raise ConfigError(
            "this model already carries an adapter: give load_adapter the backbone, or fold_adapter first"
        )
    try:
        stored = read_adapter(folder)
        starts_anew = stored.peft is not None and changes_weights(stored.peft)  # PiSSA and the like, by stock peft
        with unchanged_on_error(base, altered=[base] if starts_anew else []):
            return _attach(base, stored).eval()
    except PyraError as error:
        raise type(error)(f"{error} (the backbone is as it was)") from None


def _attach(base: nn.Module, stored: StoredAdapter) -> nn.Module:
    prompted = isinstance(stored.peft, VisualPromptsConfig)  # its tokens are to be counted when the model is wrapped
    if stored.pyra is not None and not prompted:
        _merge(base, stored, stored.pyra)
    if stored.peft is None:
        modules = dict(base.named_modules())
        needed = {f"{name}.{key}" for name in trained_modules(base) for key in modules[name].state_dict()}
        check_fit(base, base.state_dict(), stored, needed)
        base.load_state_dict(stored.weights, strict=False)
        return base.requires_grad_(False)
    config = stored.peft
    try:
        config.inference_mode = True
        origin, config.base_model_name_or_path = config.base_model_name_or_path, None
        model = get_peft_model(base, config)  # puts None there for models that are not transformers', with a warning
        config.base_model_name_or_path = origin
    except PyraError:
        raise
    except Exception as error:  # the file may ask for anything, and peft raises what comes up
        raise CheckpointError(f"{stored.folder} does not fit this backbone: {one_line(error)}") from None
    if stored.pyra is not None and prompted:
        _merge(base, stored, stored.pyra)
        carry_reactivation(model)
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
    check_merging(base, stored)
    _take_stored_lengths(base, stored.weights)


def _take_stored_lengths(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each re-activation module as many rows as were stored for its block."""
    stored = {f".{key}": tensor for key, tensor in weights.items() if key.endswith(".pair_weight")}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == REACTIVATION:
            own: Tensor = module.pair_weight
            for key, tensor in stored.items():
                fits = tensor.ndim == 2 and len(tensor) and tensor.shape[1:] == own.shape[1:]
                if key.endswith(f".{name}.pair_weight") and fits:  # what does not fit is told with the rest
                    module.pair_weight = nn.Parameter(torch.zeros_like(tensor, dtype=own.dtype, device=own.device))
