"""The adapter folder: peft's two files, and ``pyra_config.json`` where tokens merge.

adapter_model.safetensors   PEFT weights, re-activation weights and head
adapter_config.json         peft's configuration (absent without a PEFT method)
pyra_config.json            PyraConfig and the schedule it became (absent without merging)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.adapters.adapt import carry_reactivation
from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.starts import save_as_plain_lora
from pyra.adapters.targets import REACTIVATION, trained_modules
from pyra.backbones import wrap, wrapped_config, wrapped_schedule
from pyra.checkpoints import value_problems
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError
from pyra.files import write_json

WEIGHTS, PEFT_FILE, PYRA_FILE = "adapter_model.safetensors", "adapter_config.json", "pyra_config.json"


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write everything that was trained to ``folder``.

    Each file is replaced atomically, and what an older adapter left is removed last. The PEFT files are those of
    ``PeftModel.save_pretrained``, without its empty model card.

    Args:
        model: from :func:`pyra.adapters.adapt`.
        folder: created if missing.

    Raises:
        ConfigError: where the model carries several adapters, or trained weights that PEFT would not save (named).
        CheckpointError: where a trained weight is NaN or infinite (named); nothing is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as staging:
        written = Path(staging)
        if isinstance(model, PeftModel):
            name = _only_adapter(model)
            carry_reactivation(model)  # where tokens came to merge after the PEFT method was attached
            _check_nothing_is_lost(model, name)
            model.save_pretrained(staging, save_embedding_layers=False)
            written = written if name == "default" else written / name
            save_as_plain_lora(model, written / WEIGHTS, written / PEFT_FILE)
        else:
            modules = dict(model.named_modules())
            trained = {f"{name}.{key}" for name in trained_modules(model) for key in modules[name].state_dict()}
            trained |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            kept = {k: v.contiguous() for k, v in model.state_dict().items() if k in trained}
            save_file(kept, written / WEIGHTS)
        config = wrapped_config(model)
        if config is not None:
            write_json(written / PYRA_FILE, {**config.to_dict(), "solved_schedule": wrapped_schedule(model)})
        problems = value_problems(load_file(written / WEIGHTS))
        if problems:
            raise CheckpointError("this adapter is not worth saving: " + "; ".join(problems[:8]))
        files = sorted(file for file in written.iterdir() if file.name != "README.md")  # an empty model card
        for file in files:
            os.replace(file, folder / file.name)
        for name in {PEFT_FILE, PYRA_FILE} - {file.name for file in files}:
            (folder / name).unlink(missing_ok=True)


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Attach a saved adapter to a fresh backbone of the same width and depth.

    Merging, PEFT layers, re-activation weights and head are restored. The backbone may have another token count: a
    rate is solved anew, and re-activation weights keep the length they were stored with. A block that merges only at
    the new token count has no stored weights, and the adapter is then refused.

    Args:
        base: the backbone with its pretrained weights and a head of the right size (changed in place).
        folder: written by :func:`save_adapter`.

    Returns:
        The model as :func:`pyra.adapters.adapt` returns it, in evaluation mode.

    Raises:
        CheckpointError: for a folder that holds no readable adapter, or tensors that do not fit, are missing, have no
            place or hold NaN (named); the backbone is then as it was.
    """
    folder = Path(folder)
    weights = read_adapter_weights(folder)
    with unchanged_on_error(base):
        return _attach(base, folder, weights).eval()


def _attach(base: nn.Module, folder: Path, weights: dict[str, Tensor]) -> nn.Module:
    if (folder / PYRA_FILE).is_file():
        wrap(base, _read_pyra_config(folder / PYRA_FILE))
        _take_stored_lengths(base, weights)
    elif any(f".{REACTIVATION}." in key for key in weights):
        raise CheckpointError(f"{folder}: {PYRA_FILE} is missing, but re-activation weights are there: tokens merged")
    if not (folder / PEFT_FILE).is_file():
        modules = dict(base.named_modules())
        needed = {f"{name}.{key}" for name in trained_modules(base) for key in modules[name].state_dict()}
        _check_fit(base.state_dict(), weights, needed)
        base.load_state_dict(weights, strict=False)
        return base.requires_grad_(False)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        origin, config.base_model_name_or_path = config.base_model_name_or_path, None
        model = get_peft_model(base, config)  # puts None there for models that are not transformers', with a warning
        config.base_model_name_or_path = origin
    except Exception as error:  # the file may ask for anything, and peft raises what comes up
        raise CheckpointError(f"{folder}: the adapter does not fit this backbone: {_one_line(error)}") from None
    own = _adapter_state(model, "default")
    _check_fit(own, weights, set(own))
    set_peft_model_state_dict(model, weights)
    return model


def read_adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder; raises :class:`CheckpointError` where there are none."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {WEIGHTS} there; give a folder written by save_adapter, or adapter/ of a run"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_one_line(error)})") from None


def _read_pyra_config(path: Path) -> PyraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable configuration ({_one_line(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    values.pop("solved_schedule", None)
    return PyraConfig.from_dict(values)


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


def _adapter_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves; embeddings are left out without asking the hub whether they changed."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return state


def _only_adapter(model: PeftModel) -> str:
    names = list(model.peft_config)
    if len(names) != 1:
        raise ConfigError(
            f"the model carries {len(names)} adapters ({', '.join(names)}), one can be saved: delete_adapter the others"
        )
    return str(names[0])


def _check_nothing_is_lost(model: PeftModel, adapter: str) -> None:
    """Refuse to save where a weight that was trained belongs to no adapter and to no module saved whole."""
    state = _adapter_state(model, adapter)
    if model.peft_config[adapter].is_prompt_learning:  # saved is what their encoder makes of its weights
        state |= {name: p for name, p in model.named_parameters() if name.startswith("prompt_encoder.")}
    saved = {tensor.data_ptr() for tensor in state.values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.data_ptr() not in saved
        and name.replace(f".{adapter}", "") not in state  # AdaLoRA saves the rows that are left, copied
    ]
    if lost:
        raise ConfigError(
            f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: trained, but PEFT does not save them; "
            "name their modules in modules_to_save"
        )


def _check_fit(own: Mapping[str, Tensor], weights: dict[str, Tensor], needed: set[str]) -> None:
    problems = [f"{key} is not in the model" for key in weights if key not in own]
    problems += [f"{key} is not in the file" for key in sorted(needed - set(weights))]
    problems += [
        f"{key} is {list(tensor.shape)}, the model has {list(own[key].shape)}"
        for key, tensor in weights.items()
        if key in own and own[key].shape != tensor.shape
    ]
    problems += value_problems(weights)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError("the adapter does not fit this backbone: " + "; ".join(problems[:8]) + more)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
