"""Pictures of merged tokens: every group of patches that ended up in one token is drawn as one region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

_TILE = 224
_PATCH = 12  # pixels along a patch at least: an outline of one pixel then leaves most of it
_WIDE = 2  # tiles this many times as wide as high are laid out below each other
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
    patch: tuple[int, int] = (1, 1),
    single_as_image: bool = False,
) -> Image.Image:
    """Draw each image beside its merged-token views, one row an image, one column a layer.

    Views at least twice as wide as high stand below each other: one column an image, one row a layer.
    A region is filled with its mean colour, mixed with the image; thin outlines run only between different groups.

    Args:
        images: as the backbone saw them (after cropping); each is resized to the grid.
        source_maps: for each image one integer tensor [h * w] a column: the group of every patch, row by row.
        grid: patches (h, w).
        titles: one for the images, then one for each column; default "input" and the token counts.
        scale: pixels along a patch (its shorter side); by default a view is about 224 pixels high or wide, and larger
            where patches would be smaller than 12 pixels.
        blend: share of the mean colour in a region, 0 (the image) to 1 (flat).
        patch: shape (h, w) of a patch, in any unit.
        single_as_image: leave a patch that merged with no other as it is in the image, without an outline between two
            of them: what has merged then stands out.

    Raises:
        ValueError: counts or sizes that do not match, with the numbers.
    """
    maps = _checked(images, source_maps, grid)
    height, width = grid
    short = min(patch)
    if short < 1:
        raise ValueError(f"the sides of a patch must be at least 1, not {patch[0]} and {patch[1]}")
    if scale is None:
        scale = max(_PATCH, round(_TILE * short / max(height * patch[0], width * patch[1])))
    if scale < 2 or not 0 <= blend <= 1:
        raise ValueError(f"scale must be at least 2 and blend between 0 and 1, not {scale} and {blend}")
    cell = (round(scale * patch[0] / short), round(scale * patch[1] / short))
    columns = 1 + len(maps[0])
    titles = _default_titles(maps) if titles is None else list(titles)
    if len(titles) != columns:
        raise ValueError(f"{len(titles)} titles for {columns} columns (the images and {columns - 1} source maps each)")

    rows = []
    for image, groups in zip(images, maps, strict=True):
        size = (width * cell[1], height * cell[0])
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, dtype=np.float32)
        views = (_region_view(pixels, group.reshape(grid), cell, blend, single_as_image) for group in groups)
        rows.append([resized, *views])
    return _arranged(rows, titles)


def _arranged(rows: list[list[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Lay tiles out under their titles: a row an image, or, where tiles are wide, a column an image."""
    tile_w, tile_h = rows[0][0].size
    upright = tile_w < _WIDE * tile_h
    font = ImageFont.load_default(size=max(13, min(24, tile_w // 12)))
    wrapped = [_wrap(title, font, tile_w) for title in titles]
    line = sum(font.getmetrics()) + 2 if isinstance(font, ImageFont.FreeTypeFont) else 14
    header = line * max(len(lines) for lines in wrapped) + _GAP // 2
    # A tile narrower than a word of its title leaves the word room.
    step_x = _GAP + max(tile_w, *(math.ceil(font.getlength(text)) for lines in wrapped for text in lines))
    step_y = _GAP + tile_h + (0 if upright else header)
    across, down = (len(titles), len(rows)) if upright else (len(rows), len(titles))
    size = (across * step_x + _GAP, _GAP + (header if upright else 0) + down * step_y)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, tiles in enumerate(rows):
        for column, (tile, lines) in enumerate(zip(tiles, wrapped, strict=True)):
            x, y = (column, row) if upright else (row, column)
            left, top = _GAP + x * step_x, _GAP + header + y * step_y
            sheet.paste(tile, (left, top))
            for index, text in enumerate(lines if row == 0 else []):
                draw.text((left, top - _GAP // 2 - line * (len(lines) - index)), text, fill=_INK, font=font)
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


def _region_view(
    pixels: npt.NDArray[np.float32],
    groups: npt.NDArray[Any],
    cell: tuple[int, int],
    blend: float,
    single_as_image: bool,
) -> Image.Image:
    """Colour one tile: ``pixels`` [h * cell height, w * cell width, 3], ``groups`` [h, w]."""
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    index = inverse.reshape(groups.shape).repeat(cell[0], axis=0).repeat(cell[1], axis=1)
    flat = index.ravel()
    counts = np.bincount(flat)[:, None]
    means = np.stack([np.bincount(flat, weights=pixels[..., c].ravel()) for c in range(3)], axis=1) / counts
    plain = (sizes == 1)[index] & single_as_image
    share = np.where(plain, 0.0, blend)[..., None]
    view = share * means[index] + (1 - share) * pixels

    edge = np.zeros(index.shape, dtype=bool)
    edge[:, 1:] |= (index[:, 1:] != index[:, :-1]) & ~(plain[:, 1:] & plain[:, :-1])
    edge[1:, :] |= (index[1:, :] != index[:-1, :]) & ~(plain[1:, :] & plain[:-1, :])
    # A line darker or lighter than its own region stays visible on black clothes and on white walls alike.
    bright = means @ np.array([0.299, 0.587, 0.114]) > 80
    ink = np.where(bright, 0.0, 255.0)[index][..., None]
    view = np.where(edge[..., None], 0.55 * ink + 0.45 * view, view)
    return Image.fromarray(view.round().clip(0, 255).astype(np.uint8))
