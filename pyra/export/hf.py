"""``hf``: safetensors and ``config.json`` as timm or transformers write them, with what merges under the key ``pyra``.

The model comes back as what it was, a timm or transformers model whose rate can be switched, without PEFT:
:func:`load_model`, or ``AutoModelForImageClassification.from_pretrained`` for a model of transformers once ``pyra`` is
imported (:mod:`pyra.export.auto`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pyra.backbones import wrap, wrapped_config
from pyra.backbones.layers import REACTIVATION, give_reactivation, merging_layers
from pyra.backbones.loading import create_backbone, save_timm_model
from pyra.checkpoints import value_problems
from pyra.config import PyraConfig
from pyra.errors import ConfigError, ExportError, PyraError
from pyra.export.card import card
from pyra.export.loading import damaged
from pyra.export.logits import logits_of
from pyra.files import read_object, write_json, write_text

if TYPE_CHECKING:
    from pyra.export.exporting import Job
    from pyra.export.record import ExportRecord

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PROCESSOR = "preprocessor_config.json"
KEY = "pyra"
_SCHEDULE = "solved_schedule"


def write(model: nn.Module, staging: Path, job: Job) -> None:
    """Write a folded model in the type that its weights had."""
    model = model.to(job.dtype)
    config = wrapped_config(model)
    merging = None if config is None else {**config.to_dict(), _SCHEDULE: job.schedule}
    try:
        _save(model, staging, merging)
    except RuntimeError as error:
        if "share memory" not in str(error):
            raise
        raise ExportError("the format hf holds weights that layers share only once: choose another format") from None
    _say_how_images_are_prepared(staging, job.metadata)
    write_text(staging / CARD, card(model, job))


def _save(model: Any, staging: Path, merging: dict[str, Any] | None) -> None:
    if hasattr(model, "pretrained_cfg"):
        try:
            save_timm_model(model, staging, {} if merging is None else {KEY: merging})
        except ConfigError as error:
            raise ExportError(f"the format hf cannot hold this model: {error}") from None
    elif hasattr(model, "config") and hasattr(model, "save_pretrained"):
        _auto().save_transformers_model(model, staging, merging)
    else:
        raise ExportError(
            f"the format hf holds models of timm and transformers, this is a {type(model).__name__}: choose another"
        )


def _say_how_images_are_prepared(folder: Path, metadata: Mapping[str, str]) -> None:
    """Where ``metadata`` says it, as ``pyra export`` does: in the words of timm, or of transformers' image processors.

    Images are squashed to the side of the model, nothing is cropped.
    """
    try:
        side, resample = int(metadata["image_size"]), Image.Resampling[metadata["interpolation"].upper()]
        mean, std = ([float(part) for part in metadata[name].split()] for name in ("mean", "std"))
    except (KeyError, ValueError):  # metadata is the caller's own: it may mean something else by these names
        return
    config = read_config(folder / CONFIG)
    if isinstance(told := config.get("pretrained_cfg"), dict):
        told |= {"interpolation": metadata["interpolation"], "crop_pct": 1.0, "crop_mode": "squash"}
        write_json(folder / CONFIG, config)
    elif "model_type" in config:
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": int(resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        }
        write_json(folder / PROCESSOR, processor)


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Open a folder of the format ``hf``: the model with its weights, merging as it was exported, in evaluation mode.

    Args:
        folder: that holds ``config.json`` and ``model.safetensors``.
        dtype: of the weights; None means that of the file.

    Returns:
        A timm or transformers model on the CPU; :func:`pyra.set_rate` switches its rate where it was trained for that.

    Raises:
        ExportError: where the folder holds no such model, or its files do not fit each other.
    """
    folder = Path(folder).expanduser()
    values = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ExportError(f"{folder}: no {WEIGHTS} there; weights in other files are not read")
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises a class of its own for each defect
        raise damaged(folder / WEIGHTS, error) from None
    try:
        model = empty_model(folder, values)
        fill(model, state, folder / WEIGHTS)
    except PyraError as error:
        raise error if isinstance(error, ExportError) else ExportError(f"{folder}: {error}") from None
    return model.to(dtype).eval() if dtype is not None else model.eval()


def empty_model(folder: Path, values: dict[str, Any]) -> nn.Module:
    """Make the model that ``config.json`` describes, wrapped, with random weights."""
    if "architecture" in values:
        classes = values.get("num_classes")
        if type(classes) is not int or classes < 1:
            raise ExportError(f"{folder / CONFIG}: num_classes is {classes!r}, not a positive number")
        model = create_backbone(str(folder), num_classes=classes, pretrained=False)
    elif "model_type" in values:
        model = _auto().empty_transformers_model(folder, values)
    else:
        raise ExportError(f"{folder / CONFIG} describes neither a model of timm nor one of transformers")
    merging = values.get(KEY)
    if merging is not None:
        if not isinstance(merging, dict):
            raise ExportError(f"{folder / CONFIG}: {KEY} = {merging!r} says not what merges")
        wrap(model, PyraConfig.from_dict({key: value for key, value in merging.items() if key != _SCHEDULE}))
    return model.requires_grad_(False)


def give_lengths(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Have re-activation weights of the stored length in each layer that has stored ones, and in no other."""
    paths = {id(module): name for name, module in model.named_modules()}
    for layer in merging_layers(model):
        rows = state.get(f"{paths[id(layer)]}.{REACTIVATION}.pair_weight")
        if rows is not None and rows.ndim == 2 and len(rows):
            give_reactivation(layer, len(rows))
        elif rows is None and hasattr(layer, REACTIVATION):
            del layer.reactivation


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put stored weights in their places, each layer's re-activation weights in the length they have.

    Raises:
        ExportError: naming every tensor that does not fit, is missing, or has no place.
    """
    give_lengths(model, state)
    own = model.state_dict()
    problems = [
        f"{key} is {list(state[key].shape)}, the model has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems += [f"{key} is not in the file" for key in own if key not in state]
    problems += [f"{key} has no place in the model" for key in state if key not in own]
    problems += value_problems({key: value for key, value in state.items() if own.get(key, value).is_floating_point()})
    types = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    problems += [f"it mixes weights of {' and '.join(types)}"] if len(types) > 1 else []
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ExportError(f"{path} does not fit its {CONFIG}: {shown}")
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def open_file(folder: Path, record: ExportRecord, runtime: str, threads: int | None) -> Callable[[Tensor], Tensor]:
    """Open the folder as a callable on pixel values."""
    from pyra.export.programs import with_threads

    model = load_model(folder)
    dtype = next(parameter.dtype for parameter in model.parameters())
    return with_threads(lambda pixel_values: logits_of(model(pixel_values.to(dtype))), threads)


def _auto() -> Any:
    """Import :mod:`pyra.export.auto` after the Auto models of transformers, see :mod:`pyra.registering`."""
    importlib.import_module("transformers.models.auto.modeling_auto")
    return importlib.import_module("pyra.export.auto")


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json``; raises :class:`ExportError` where it is missing or no JSON object."""
    return read_object(path, ExportError, "give a folder of the format hf")
