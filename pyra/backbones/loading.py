"""Backbones by name or folder, and checkpoints from files: nothing is unpickled, no code is run.

The one module beside ``timm_*`` that imports timm, because it creates models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from pyra.checkpoints import read_state_dict, value_problems
from pyra.errors import CheckpointError, ConfigError, did_you_mean
from pyra.files import read_json


def create_backbone(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model with a head of ``num_classes`` (new, unless the weights bring one of that size).

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
        _refuse_other_kinds(folder)
        name = f"local-dir:{folder.resolve()}"
    elif name.split(".")[0] not in timm.list_models():
        close = did_you_mean(name.split(".")[0], timm.list_models())
        raise ConfigError(f"unknown backbone {name!r}{close}; give a timm name (timm.list_models()) or a folder")
    elif "." in name and name not in timm.list_pretrained(f"{name.split('.')[0]}*"):
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ConfigError(f"unknown pretrained tag in {name!r}{did_you_mean(name, tags)}; there are {', '.join(tags)}")
    if image_size is not None:
        kwargs["img_size"] = image_size
    if folder.is_dir() and pretrained and checkpoint is None:
        checkpoint = weights_file(folder)  # read as any checkpoint: timm would leave out what does not fit
    if not pretrained or checkpoint is not None:
        model = _without_weights(name, num_classes, kwargs)
        _check_image_size(model, image_size)
        if checkpoint is not None:
            load_backbone_checkpoint(model, checkpoint)
        return model
    try:
        model = timm.create_model(name, pretrained=True, num_classes=num_classes, **kwargs)
    except Exception as error:  # the hub, the file, or the options: created without weights, the options show
        _check_image_size(_without_weights(name, num_classes, kwargs), image_size)
        raise ConfigError(
            f"the weights of {name!r} could not be had ({_one_line(error)}); give a local file with --checkpoint"
        ) from None
    _check_image_size(model, image_size)
    return model


def _refuse_other_kinds(folder: Path) -> None:
    """Say what a folder of transformers holds: timm would fail without a word about it."""
    try:
        values = read_json(folder / "config.json")
    except (OSError, ValueError):
        return  # timm tells what is wrong with it
    if isinstance(values, dict) and "model_type" in values and "architecture" not in values:
        what = "a language model" if "vocab_size" in values else f"a model of transformers ({values['model_type']})"
        raise ConfigError(
            f"{folder} is {what}: a task of images takes a timm name, or a folder that timm has saved; "
            "`pyra tasks ls` lists the language tasks"
        )


def save_timm_model(model: nn.Module, folder: Path, extra: dict[str, Any]) -> None:
    """Write a timm model to ``folder`` as timm does: ``config.json`` and ``model.safetensors``.

    Args:
        model: that ``timm.create_model`` made, wrapped or not.
        folder: to write to.
        extra: further entries of ``config.json``.

    Raises:
        ConfigError: for a model that timm cannot describe, with its reason.
    """
    try:
        timm.models.save_for_hf(model, str(folder), model_config=extra, safe_serialization=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"timm cannot describe this model well enough to make it again: {_one_line(error)}") from None


def weights_file(folder: Path) -> Path:
    """Return the weights in a folder that timm has saved; raises :class:`ConfigError` where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{folder}: no model.safetensors there; a backbone folder is one that timm has saved")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the backbone's input: squashed to ``image_size``, then normalised."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preprocessing(model: nn.Module) -> Preprocessing:
    """Return the preprocessing a timm model was pretrained with, at its present image size.

    Raises:
        ConfigError: for a backbone that does not take square RGB images, or whose normalisation divides by zero.
    """
    mean, std = normalisation(model)
    height, width = image_shape(model)
    if height != width:
        raise ConfigError(f"the backbone takes {height} x {width} images; only square ones are prepared here")
    return Preprocessing(height, mean, std)


def image_shape(model: nn.Module) -> tuple[int, int]:
    """Return height and width in pixels of the images that a timm model takes."""
    height, width = _inside_peft(model).patch_embed.img_size
    return int(height), int(width)


def normalisation(model: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and standard deviation of each channel, on the scale 0..1, that a timm model was pretrained with.

    Raises:
        ConfigError: for a backbone that does not take RGB images, or whose normalisation divides by zero.
    """
    config = resolve_model_data_config(_inside_peft(model))
    if len(config["mean"]) != 3 or not all(0 < std < float("inf") for std in config["std"]):
        raise ConfigError(
            f"the backbone's config has mean {config['mean']} and std {config['std']}: three each, std > 0"
        )
    return tuple(config["mean"]), tuple(config["std"])


def _inside_peft(model: nn.Module) -> Any:
    plain: Any = model
    return plain.get_base_model() if hasattr(plain, "get_base_model") else plain


def load_backbone_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file's weights into a timm model; position embeddings are resampled, a head of another size is left out.

    Raises:
        CheckpointError: naming every tensor that does not fit, is missing, or has no place.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
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
    problems += value_problems(state)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {shown}")
    model.load_state_dict(state, strict=False)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or "no reason given"
    return f"{type(error).__name__}: {text}" if isinstance(error, (KeyError, AttributeError)) else text


def _without_weights(name: str, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs)
        return model
    except Exception as error:  # a config.json may hold anything, and timm's models raise what comes up
        name = name.removeprefix("local-dir:")
        raise ConfigError(f"timm cannot create {name!r} with {kwargs}: {_one_line(error)}") from None


def _check_image_size(model: nn.Module, image_size: int | None) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if image_size is not None and patch is not None and any(image_size < side or image_size % side for side in patch):
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
