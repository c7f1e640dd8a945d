"""Backbones by name or folder, and checkpoints from files: nothing is unpickled, no code is run.

The one module beside ``timm_*`` that imports timm, because it creates models.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from pyra.errors import CheckpointError, ConfigError, did_you_mean

# What checkpoints are commonly nested under.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


def create_backbone(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model with a new head.

    Args:
        name: a timm name, with or without a pretrained tag, or a folder that holds a timm model (``config.json`` and
            ``model.safetensors``).
        num_classes: classes of the new head.
        image_size: image side in pixels; None takes the model's own. Position embeddings are resampled.
        checkpoint: weights from a ``.safetensors``, ``.npz`` (AugReg) or ``.pth`` file instead of the hub's.
        pretrained: take the hub's weights; False starts from random ones.
        kwargs: passed on to ``timm.create_model``.

    Raises:
        ConfigError: for an unknown name (with suggestions), or weights that cannot be had.
        CheckpointError: for a checkpoint that cannot be read or does not fit.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: no config.json there; a backbone folder is one that timm has saved")
        name = f"local-dir:{folder.resolve()}"
    elif name.split(".")[0] not in timm.list_models():
        close = did_you_mean(name.split(".")[0], timm.list_models())
        raise ConfigError(f"unknown backbone {name!r}{close}; give a timm name (timm.list_models()) or a folder")
    elif "." in name and name not in timm.list_pretrained(f"{name.split('.')[0]}*"):
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ConfigError(f"unknown pretrained tag in {name!r}{did_you_mean(name, tags)}; there are {', '.join(tags)}")
    if image_size is not None:
        kwargs["img_size"] = image_size
    try:
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None, num_classes=num_classes, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot create {name!r} with {kwargs}: {error}") from None
    except (OSError, RuntimeError) as error:
        if not pretrained or checkpoint is not None:
            raise
        raise ConfigError(
            f"the weights of {name!r} could not be had ({' '.join(str(error).split())[:300]}); "
            "give a local file with --checkpoint"
        ) from None
    _check_image_size(model, image_size)
    if checkpoint is not None:
        load_backbone_checkpoint(model, checkpoint)
    return model


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the backbone's input: squashed to ``image_size``, then normalised."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preprocessing(model: nn.Module) -> Preprocessing:
    """Return the preprocessing a timm model was pretrained with, at its present image size."""
    plain: Any = model
    backbone = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    config = resolve_model_data_config(backbone)
    height, width = backbone.patch_embed.img_size
    if height != width:
        raise ConfigError(f"the backbone takes {height} x {width} images; only square ones are prepared here")
    return Preprocessing(height, tuple(config["mean"]), tuple(config["std"]))


def load_backbone_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file's weights into a timm model; position embeddings are resampled, a head of another size is left out.

    Raises:
        CheckpointError: naming every tensor that does not fit, is missing, or has no place.
    """
    path = Path(path)
    if path.suffix == ".npz":
        _load_npz(model, path)
        return
    state = read_state_dict(path)
    if isinstance(model, VisionTransformer):
        try:
            state = checkpoint_filter_fn(state, model)
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise CheckpointError(f"{path}: does not fit ({' '.join(str(error).split())})") from None
    own = model.state_dict()
    heads = ("head.", "head_dist.")
    replaced = {k for k in own if k.startswith(heads) and (k not in state or state[k].shape != own[k].shape)}
    state = {k: v for k, v in state.items() if k not in replaced and not (k.startswith(heads) and k not in own)}
    problems = [
        f"{key} is {list(tensor.shape)}, the model has {list(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and own[key].shape != tensor.shape
    ]
    problems += [f"{key} is not in the file" for key in own if key not in state and key not in replaced]
    problems += [f"{key} has no place in the model" for key in state if key not in own]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {shown}")
    model.load_state_dict(state, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth``/``.pt``/``.bin`` (``weights_only``) or ``.npz`` file.

    Raises:
        CheckpointError: where the file is missing, unreadable, or would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise CheckpointError(f"{path}: unknown kind {path.suffix!r}; use .safetensors, .npz, .pth, .pt or .bin")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cannot be read without running code from it; convert it to .safetensors where you trust it"
        ) from None
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: not a readable {path.suffix} file ({' '.join(str(error).split())[:200]})"
        ) from None
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _check_image_size(model: nn.Module, image_size: int | None) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if image_size is not None and patch is not None and any(image_size % side for side in patch):
        raise ConfigError(f"image size {image_size} is not a multiple of the patch size {patch[0]}")


def _npz_blocks(arrays: dict[str, Tensor]) -> int:
    """Blocks in an AugReg file: one set of arrays each, or one stacked set."""
    numbers = {int(m[1]) for key in arrays if (m := re.search(r"encoderblock_(\d+)/", key))}
    stacked = next((len(v) for k, v in arrays.items() if "/encoderblock/" in k), 0)
    return len(numbers) or stacked


def _load_npz(model: nn.Module, path: Path) -> None:
    arrays = read_state_dict(path)
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(f"{path}: .npz weights (AugReg) fit timm's VisionTransformer only")
    blocks = _npz_blocks(arrays)
    if blocks != len(model.blocks):
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: it has {blocks} blocks, the model has {len(model.blocks)}"
        )
    width = next((tuple(v.shape) for k, v in arrays.items() if k.endswith("embedding/kernel")), None)
    try:
        model.load_pretrained(str(path))
    except (KeyError, RuntimeError, AssertionError, ValueError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: embedding/kernel is {width}, the model has "
            f"{tuple(model.patch_embed.proj.weight.shape)} ({detail})"
        ) from None
