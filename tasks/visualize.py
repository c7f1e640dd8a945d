"""What merged in an image: every token of a layer drawn as the patches that went into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pyra.backbones import geometry, locate, wrap, wrapped_config, wrapped_schedule
from pyra.backbones.features import source_maps
from pyra.backbones.layers import merging_layers
from pyra.backbones.loading import image_shape, normalisation
from pyra.config import PyraConfig
from pyra.cost import token_counts
from pyra.errors import ConfigError, DataError, OutputError
from pyra.files import atomic_path
from pyra.matching import METHODS as MATCHINGS
from pyra.records import option
from pyra.tasks.data.decoding import decode_image, unreadable
from pyra.tasks.options import RunOptions
from pyra.tasks.pictures import merged_tokens_picture
from pyra.tasks.runs import load_run, new_backbone

COLUMNS = 5
"""Layers in a picture unless others are asked for: beside the input they fill the width of a screen."""


@dataclass(kw_only=True)
class VisualizeOptions:
    """Options of ``pyra visualize``."""

    images: str | None = option(None, "image files, separated by commas", metavar="IMAGE")
    image: str | None = option(None, "the same as a flag", metavar="IMAGE")
    run: str | None = option(None, "folder written by pyra train: merge with its adapter, as it was trained")
    backbone: str | None = option(None, "instead of --run: timm name, folder of a timm model, or 'demo'")
    checkpoint: str | None = option(None, "weights of --backbone from a .safetensors, .npz or .pth file")
    pretrained: bool = option(True, "start --backbone from pretrained weights")
    image_size: int | None = option(None, "image side in pixels of --backbone; its own by default")
    rate: float | None = option(None, "share of the MACs to save, in [0, 1); the run's own by default")
    schedule: list[int] | None = option(  # noqa: RUF009 - a dataclass field
        None, "tokens removed in each block, instead of --rate: 16,16,16,..."
    )
    matching: str | None = option(None, "how pairs are found; the run's own or bipartite by default", choices=MATCHINGS)
    threshold: float | None = option(None, "cosine similarity under which a token is dropped instead of merged")
    window: int | None = option(None, "largest distance in patches that --matching local prefers")
    layers: list[int] | None = option(  # noqa: RUF009 - a dataclass field
        None, f"layers to show, counted from 1; {COLUMNS} by default, the last one always"
    )
    output: str = option("groups.png", "PNG file to write")
    overwrite: bool = option(False, "replace the file in --output")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        problems = []
        if self.images and self.image:
            problems.append("give the image as IMAGE or with --image, not both")
        elif not self.files():
            problems.append("give the image as IMAGE or with --image")
        if bool(self.run) == bool(self.backbone):
            problems.append("give exactly one of --run and --backbone")
        elif self.run:
            own = {"--checkpoint": self.checkpoint, "--image-size": self.image_size}
            given = [flag for flag, value in own.items() if value is not None]
            given += [] if self.pretrained else ["--no-pretrained"]
            if given:
                problems.append(f"a run has its own weights and image size: leave {', '.join(given)} out")
        elif self.rate is None and self.schedule is None:
            problems.append("--backbone needs --rate or --schedule: how much to merge")
        if self.image_size is not None and self.image_size < 1:
            problems.append(f"--image-size must be at least 1, got {self.image_size}")
        if self.rate is not None and self.schedule is not None:
            problems.append("give --rate or --schedule, not both")
        else:
            try:
                self.pyra_config(PyraConfig(rate=0.5))
            except ConfigError as error:
                problems.append(str(error).removeprefix("PyraConfig: "))
        if self.rate == 0 or (self.schedule and not any(self.schedule)):
            problems.append(_NOTHING_MERGES)
        if Path(self.output).suffix.lower() != ".png":
            problems.append(f"--output must end in .png, got {self.output!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    def files(self) -> list[Path]:
        """Return the image files; a file whose own name has a comma is one file."""
        given = self.images or self.image or ""
        names = [given] if Path(given).is_file() else [name.strip() for name in given.split(",") if name.strip()]
        return [Path(name).expanduser() for name in names]

    def pyra_config(self, own: PyraConfig | None) -> PyraConfig:
        """Return what to merge: a run's own configuration (None: it has none) with what was asked for in its place."""
        asked = {name: getattr(self, name) for name in ("matching", "threshold", "window")}
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if self.rate is not None or self.schedule is not None:
            changes |= {"rate": self.rate, "schedule": self.schedule}
        if own is None or self.matching == "prune":  # re-activation weights are trained, or do not apply
            changes["reactivation"] = False
        return PyraConfig(**changes) if own is None else replace(own, **changes)


_NOTHING_MERGES = "nothing merges at rate 0, so there are no groups to draw: give a --rate above 0"


@dataclass(frozen=True)
class LayerGroups:
    """What one layer left of the tokens.

    Attributes:
        layer: counted from 1.
        tokens_in: tokens that entered it, prefix tokens included.
        tokens_out: tokens that left it.
        merged: for each image the tokens that stand for more than one patch.
        largest: for each image the patches in the largest of them.
    """

    layer: int
    tokens_in: int
    tokens_out: int
    merged: list[int]
    largest: list[int]


@dataclass(frozen=True)
class Visualization:
    """A picture, the groups of every layer that merges, and the number of tokens that are no patches."""

    picture: Image.Image
    layers: list[LayerGroups]
    prefix_tokens: int


def visualize(options: VisualizeOptions) -> Visualization:
    """Picture what merges in images, and write the PNG.

    Raises:
        DataError: for an image that cannot be read, or a folder that holds no run.
        OutputError: where the file exists and is not to be overwritten, or cannot be written there.
        ConfigError: for options that do not fit the run or the backbone.
        UnsupportedModelError, ScheduleError, CheckpointError: as :func:`pyra.wrap` and the loading of weights do.
    """
    output, files = Path(options.output).expanduser(), options.files()
    _check_output(output, files, options.overwrite)
    images = [_read(file) for file in files]
    drawn = draw(merging_model(options), images, options.layers)
    with atomic_path(output) as temporary:
        drawn.picture.save(temporary)
    return drawn


def merging_model(options: VisualizeOptions) -> nn.Module:
    """Return the wrapped model of the options, in evaluation mode."""
    if options.run:
        return _run_model(options, options.run)
    made = RunOptions(
        backbone=str(options.backbone),
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        image_size=options.image_size,
        method="linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.seed)  # with --no-pretrained the same picture every time
        model = new_backbone(made, num_classes=0)
    return wrap(model.eval(), options.pyra_config(None))


def _run_model(options: VisualizeOptions, folder: str) -> nn.Module:
    model, trained_with, _ = load_run(folder)
    own = wrapped_config(model)
    if own is None and options.rate is None and options.schedule is None:
        raise ConfigError(f"{folder} (--method {trained_with.method}) merges no tokens: give --rate or --schedule")
    config = options.pyra_config(own)
    if config == own:
        return model
    # Another configuration would start the re-activation weights anew; they are trained for any number of pairs.
    _, core = locate(model)
    trained = {layer.step.layer: getattr(layer, "reactivation", None) for layer in merging_layers(core)}
    for layer in merging_layers(wrap(core, config)):
        kept = trained.get(layer.step.layer)
        if hasattr(layer, "reactivation") and isinstance(kept, nn.Module):
            layer.reactivation = kept
    return model.eval()


def draw(model: nn.Module, images: Sequence[Image.Image], layers: Sequence[int] | None = None) -> Visualization:
    """Draw the groups of a wrapped timm model.

    Args:
        model: in the state that is to be pictured.
        images: RGB, of any size; squashed to the model's as in training.
        layers: which to show beside the last, counted from 1; None takes about five of those that merge.

    Raises:
        ConfigError: where nothing merges, or for a layer that the model does not have.
    """
    _, core = locate(model)
    schedule = wrapped_schedule(model) or []
    if not any(schedule):
        raise ConfigError(_NOTHING_MERGES)
    if layers is not None and not all(1 <= layer <= len(schedule) for layer in layers):
        raise ConfigError(f"--layers must be in 1..{len(schedule)}, got {', '.join(map(str, layers))}")
    merging = [layer for layer, removed in enumerate(schedule, start=1) if removed]
    shown = sorted({*(layers or _spread(merging, COLUMNS)[:-1]), len(schedule)})
    height, width = image_shape(core)
    seen = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    sizes = geometry(model)
    counts = token_counts(sizes, schedule)
    groups = _groups(model, _tensor(seen, model), sizes.prefix_tokens, len(schedule))
    titles = [f"layer {layer}: {counts[layer]} tokens" for layer in shown[:-1]] + [f"final: {counts[-1]} tokens"]
    patch: Any = core.patch_embed
    picture = merged_tokens_picture(
        seen,
        [[groups[layer][row] for layer in shown] for row in range(len(seen))],
        patch.grid_size,
        titles=["input", *titles],
        patch=patch.patch_size,
        single_as_image=True,
    )
    return Visualization(
        picture,
        [_layer_groups(layer, counts, groups[layer]) for layer in merging],
        sizes.prefix_tokens,
    )


def _groups(model: nn.Module, batch: torch.Tensor, prefix: int, depth: int) -> dict[int, torch.Tensor]:
    """For each layer, counted from 1, a [B, patches] map: the token that holds each patch after it."""
    maps = source_maps(model, batch)
    patches = next(iter(maps.values()))[:, prefix:]
    alone = torch.arange(patches.shape[1]).expand_as(patches)  # up to the first layer that merges
    return {layer: maps[layer - 1][:, prefix:] if layer - 1 in maps else alone for layer in range(1, depth + 1)}


def _layer_groups(layer: int, counts: list[int], groups: torch.Tensor) -> LayerGroups:
    sizes = [torch.bincount(row) for row in groups]
    merged, largest = [int((size > 1).sum()) for size in sizes], [int(size.max()) for size in sizes]
    return LayerGroups(layer, counts[layer - 1], counts[layer], merged, largest)


def _spread(layers: list[int], count: int) -> list[int]:
    """Choose ``count`` of the layers at even distances, the first and the last among them."""
    if len(layers) <= count:
        return layers
    return [layers[round(step * (len(layers) - 1) / (count - 1))] for step in range(count)]


def _tensor(images: Sequence[Image.Image], model: nn.Module) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation(model))
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    return (pixels.float() / 255 - mean) / std


def _read(file: Path) -> Image.Image:
    if not file.exists():
        raise DataError(f"{file}: no such image")
    try:
        return decode_image(file)
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or unreadable(error)
        raise DataError(f"{file} cannot be read as an image: {reason}") from None


def _check_output(output: Path, files: Sequence[Path], overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder {output.parent}: create it or choose another --output")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; --output names a PNG file")
    if output.resolve() in [file.resolve() for file in files]:
        raise OutputError(f"{output} is one of the images: choose another --output")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} already exists: pass --overwrite to replace it or choose another --output")
