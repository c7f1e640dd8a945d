"""The adapter folder: peft's two files, and ``pyra_config.json`` where tokens merge.

adapter_model.safetensors   PEFT weights, re-activation weights and head
adapter_config.json         peft's configuration (absent without a PEFT method)
pyra_config.json            PyraConfig and the schedule it became (absent without merging)
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.adapters.adapt import REACTIVATION, trained_modules
from pyra.backbones import wrap, wrapped_config, wrapped_schedule
from pyra.config import PyraConfig
from pyra.errors import CheckpointError
from pyra.files import write_json

WEIGHTS, PEFT_FILE, PYRA_FILE = "adapter_model.safetensors", "adapter_config.json", "pyra_config.json"


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write everything that was trained to ``folder``.

    Each file is replaced atomically. The PEFT files are those of ``PeftModel.save_pretrained``.

    Args:
        model: from :func:`pyra.adapters.adapt`.
        folder: created if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as staging:
        if isinstance(model, PeftModel):
            model.save_pretrained(staging, save_embedding_layers=False)
        else:
            modules = dict(model.named_modules())
            trained = {f"{name}.{key}" for name in trained_modules(model) for key in modules[name].state_dict()}
            trained |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            kept = {k: v.contiguous() for k, v in model.state_dict().items() if k in trained}
            save_file(kept, Path(staging) / WEIGHTS)
        config = wrapped_config(model)
        if config is not None:
            write_json(Path(staging) / PYRA_FILE, {**config.to_dict(), "solved_schedule": wrapped_schedule(model)})
        for name in (PEFT_FILE, PYRA_FILE):  # none of an older adapter may stay behind
            (folder / name).unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir()):
            os.replace(file, folder / file.name)


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
        CheckpointError: for a folder that holds no readable adapter, or tensors that do not fit (named).
    """
    folder = Path(folder)
    weights = read_adapter_weights(folder)
    if (folder / PYRA_FILE).is_file():
        wrap(base, _read_pyra_config(folder / PYRA_FILE))
        _take_stored_lengths(base, weights)
    elif any(f".{REACTIVATION}." in key for key in weights):
        raise CheckpointError(f"{folder}: {PYRA_FILE} is missing, but re-activation weights are there: tokens merged")
    if not (folder / PEFT_FILE).is_file():
        _check_fit(base, weights)
        base.load_state_dict(weights, strict=False)
        base.requires_grad_(False)
        return base.eval()
    try:
        model = PeftModel.from_pretrained(base, str(folder), config=PeftConfig.from_pretrained(str(folder)))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the adapter does not fit this backbone: {_one_line(error)}") from None
    return model.eval()


def read_adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder; raises :class:`CheckpointError` where there are none."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS} there; give a folder written by save_adapter or `pyra train`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_one_line(error)})") from None


def _read_pyra_config(path: Path) -> PyraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("solved_schedule", None)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable configuration ({_one_line(error)})") from None
    return PyraConfig.from_dict(values)


def _take_stored_lengths(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each re-activation module as many rows as were stored for its block."""
    stored = {key.split("blocks.")[-1]: tensor for key, tensor in weights.items() if "pair_weight" in key}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == REACTIVATION:
            block = name.split("blocks.")[-1].removesuffix(f".{REACTIVATION}")
            for key, tensor in stored.items():
                if key.startswith(f"{block}.{REACTIVATION}."):
                    own: Tensor = module.pair_weight
                    module.pair_weight = nn.Parameter(torch.zeros_like(tensor, dtype=own.dtype, device=own.device))


def _check_fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    problems = [f"{key} is not in the model" for key in weights if key not in own]
    problems += [
        f"{key} is {list(tensor.shape)}, the model has {list(own[key].shape)}"
        for key, tensor in weights.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError("the adapter does not fit this backbone: " + "; ".join(problems))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
