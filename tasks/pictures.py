"""Pictures of merged tokens: every group of patches that ended up in one token is drawn as one region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

_TILE = 224
_GAP = 12
_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)


def merged_tokens_picture(
    images: Sequence[Image.Image],
    source_maps: Sequence[Sequence[Tensor]],
    grid: tuple[int, int],
    *,
    titles: Sequence[str] | None = None,
    scale: int | None = None,
    blend: float = 0.75,
) -> Image.Image:
    """Draw each image beside its merged-token views, one row an image, one column a layer.

    A region is filled with its mean colour, mixed with the image; thin outlines run only between different groups.

    Args:
        images: as the backbone saw them (after cropping); each is resized to the grid.
        source_maps: for each image one integer tensor [h * w] a column: the group of every patch, row by row.
        grid: patches (h, w).
        titles: one for the images, then one for each column; default "input" and the token counts.
        scale: pixels along a patch; by default a view is about 224 pixels high or wide.
        blend: share of the mean colour in a region, 0 (the image) to 1 (flat).

    Raises:
        ValueError: counts or sizes that do not match, with the numbers.
    """
    maps = _checked(images, source_maps, grid)
    height, width = grid
    if scale is None:
        scale = max(4, round(_TILE / max(grid)))
    if scale < 2 or not 0 <= blend <= 1:
        raise ValueError(f"scale must be at least 2 and blend between 0 and 1, not {scale} and {blend}")
    columns = 1 + len(maps[0])
    titles = _default_titles(maps) if titles is None else list(titles)
    if len(titles) != columns:
        raise ValueError(f"{len(titles)} titles for {columns} columns (the images and {columns - 1} source maps each)")

    tile_w, tile_h = width * scale, height * scale
    font = ImageFont.load_default(size=max(13, min(18, tile_w // 12)))
    wrapped = [_wrap(title, font, tile_w) for title in titles]
    line = sum(font.getmetrics()) + 2 if isinstance(font, ImageFont.FreeTypeFont) else 14
    header = line * max(len(lines) for lines in wrapped) + _GAP // 2
    size = (columns * (tile_w + _GAP) + _GAP, _GAP + header + len(images) * (tile_h + _GAP))
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for index, text in enumerate(lines):
            top = _GAP + header - _GAP // 2 - line * (len(lines) - index)
            draw.text((_GAP + column * (tile_w + _GAP), top), text, fill=_INK, font=font)
    for row, (image, groups) in enumerate(zip(images, maps, strict=True)):
        resized = image.convert("RGB").resize((tile_w, tile_h), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, dtype=np.float32)
        tiles = [resized, *(_region_view(pixels, group.reshape(height, width), scale, blend) for group in groups)]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + column * (tile_w + _GAP), _GAP + header + row * (tile_h + _GAP)))
    return sheet


def _checked(
    images: Sequence[Image.Image], source_maps: Sequence[Sequence[Tensor]], grid: tuple[int, int]
) -> list[list[npt.NDArray[Any]]]:
    """Return the maps as arrays [h * w] after checking every count."""
    if not images:
        raise ValueError("no images to draw")
    if len(images) != len(source_maps):
        raise ValueError(f"{len(images)} images but {len(source_maps)} lists of source maps")
    patches = grid[0] * grid[1]
    maps = [[np.asarray(m.detach().cpu() if hasattr(m, "detach") else m) for m in columns] for columns in source_maps]
    for index, columns in enumerate(maps):
        if len(columns) != len(maps[0]):
            raise ValueError(f"image {index} has {len(columns)} source maps, image 0 has {len(maps[0])}")
        for layer, groups in enumerate(columns):
            if groups.shape != (patches,) or not np.issubdtype(groups.dtype, np.integer):
                raise ValueError(
                    f"source map {layer} of image {index} has shape {list(groups.shape)} and type {groups.dtype}; a "
                    f"grid of {grid[0]} x {grid[1]} patches needs [{patches}] and integers"
                )
    return maps


def _default_titles(maps: list[list[npt.NDArray[Any]]]) -> list[str]:
    counts = [sorted({len(np.unique(groups)) for groups in column}) for column in zip(*maps, strict=True)]
    return ["input", *(f"{c[0]} tokens" if len(c) == 1 else f"{c[0]} to {c[-1]} tokens" for c in counts)]


def _wrap(title: str, font: Any, width: int) -> list[str]:
    """Break a title between words so that every line fits; a single long word stays whole."""
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _region_view(pixels: npt.NDArray[np.float32], groups: npt.NDArray[Any], scale: int, blend: float) -> Image.Image:
    """Colour one tile: ``pixels`` [h * scale, w * scale, 3], ``groups`` [h, w]."""
    _, inverse = np.unique(groups, return_inverse=True)
    index = inverse.reshape(groups.shape).repeat(scale, axis=0).repeat(scale, axis=1)
    flat = index.ravel()
    counts = np.bincount(flat)[:, None]
    means = np.stack([np.bincount(flat, weights=pixels[..., c].ravel()) for c in range(3)], axis=1) / counts
    view = blend * means[index] + (1 - blend) * pixels

    edge = np.zeros(index.shape, dtype=bool)
    edge[:, 1:] |= index[:, 1:] != index[:, :-1]
    edge[1:, :] |= index[1:, :] != index[:-1, :]
    # A line darker or lighter than its own region stays visible on black clothes and on white walls alike.
    bright = means @ np.array([0.299, 0.587, 0.114]) > 80
    ink = np.where(bright, 0.0, 255.0)[index][..., None]
    view = np.where(edge[..., None], 0.55 * ink + 0.45 * view, view)
    return Image.fromarray(view.round().clip(0, 255).astype(np.uint8))
