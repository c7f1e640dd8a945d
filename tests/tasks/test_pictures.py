"""Merged-token pictures: colours, outlines, layout and the errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyra.tasks.pictures import _GAP, merged_tokens_picture

H, W, SCALE = 3, 4, 16


@pytest.fixture
def photo():
    noise = np.random.default_rng(0).integers(0, 256, (H * SCALE, W * SCALE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def view(sheet, column, row=0, rows=1):
    """The pixels of one tile, counted from the lower right corner (the header is on top)."""
    left = _GAP + column * (W * SCALE + _GAP)
    top = sheet.height - (rows - row) * (H * SCALE + _GAP)
    return np.asarray(sheet)[top : top + H * SCALE, left : left + W * SCALE].astype(float)


def interior(patch_row, patch_column):
    """Pixels of a patch away from any outline."""
    rows = slice(patch_row * SCALE + 2, (patch_row + 1) * SCALE - 2)
    return rows, slice(patch_column * SCALE + 2, (patch_column + 1) * SCALE - 2)


def test_region_has_the_mean_colour_of_its_scattered_patches(photo):
    groups = torch.arange(H * W) + 100
    groups[[0, 1, 11]] = 7
    sheet = merged_tokens_picture([photo], [[groups]], (H, W), scale=SCALE, blend=1.0)
    pixels = np.asarray(photo).astype(float)
    assert np.array_equal(view(sheet, 0), pixels)
    patches = [pixels[:SCALE, :SCALE], pixels[:SCALE, SCALE : 2 * SCALE], pixels[2 * SCALE :, 3 * SCALE :]]
    mean = np.mean(patches, axis=(0, 1, 2))
    for where in [(0, 0), (0, 1), (2, 3)]:
        assert np.abs(view(sheet, 1)[interior(*where)] - mean).max() <= 0.51
    alone = pixels[SCALE : 2 * SCALE, :SCALE].mean((0, 1))
    assert np.abs(view(sheet, 1)[interior(1, 0)] - alone).max() <= 0.51
    assert np.abs(alone - mean).max() > 1


def test_blend_mixes_the_image_back_in(photo):
    groups = torch.zeros(H * W, dtype=torch.long)
    pixels = np.asarray(photo).astype(float)
    half = view(merged_tokens_picture([photo], [[groups]], (H, W), scale=SCALE, blend=0.5), 1)
    assert np.abs(half - (pixels + pixels.mean((0, 1))) / 2).max() <= 0.51
    assert np.array_equal(view(merged_tokens_picture([photo], [[groups]], (H, W), scale=SCALE, blend=0), 1), pixels)


def test_outlines_only_between_different_groups():
    grey = Image.new("RGB", (W * SCALE, H * SCALE), (200, 200, 200))
    groups = torch.tensor([[0, 0, 1, 1]] * H).ravel()
    tile = view(merged_tokens_picture([grey], [[groups]], (H, W), scale=SCALE), 1)
    different = np.unique(np.argwhere(tile != 200)[:, 1])
    assert different.tolist() == [2 * SCALE]
    black = Image.new("RGB", grey.size)
    assert view(merged_tokens_picture([black], [[groups]], (H, W), scale=SCALE), 1)[:, 2 * SCALE].min() > 100


def test_rows_columns_and_titles(photo):
    maps = [torch.arange(H * W), torch.arange(H * W) // 2]
    red = Image.new("RGB", (50, 40), (255, 0, 0))
    sheet = merged_tokens_picture([photo, red], [maps, maps], (H, W), scale=SCALE)
    assert sheet.width == _GAP + 3 * (W * SCALE + _GAP)
    assert (view(sheet, 0, row=1, rows=2) == (255, 0, 0)).all()
    assert (view(sheet, 2, row=1, rows=2)[interior(0, 0)] == (255, 0, 0)).all()
    header = sheet.height - 2 * (H * SCALE + _GAP)
    for column in range(3):
        left = _GAP + column * (W * SCALE + _GAP)
        assert np.asarray(sheet)[:header, left : left + W * SCALE].min() < 100
    titles = ["a", "b", "layer 4: 61 tokens"]
    other = merged_tokens_picture([photo, red], [maps, maps], (H, W), scale=SCALE, titles=titles)
    assert np.array_equal(view(sheet, 2), view(other, 2))
    assert other.height > sheet.height, "a long title wraps onto more lines"


def test_unmerged_patches_can_stay_as_they_are(photo):
    groups = torch.arange(H * W)
    groups[[0, 1]] = 1
    tile = view(merged_tokens_picture([photo], [[groups]], (H, W), scale=SCALE, single_as_image=True), 1)
    pixels = np.asarray(photo).astype(float)
    lined = np.zeros((H * SCALE, W * SCALE), dtype=bool)
    lined[:SCALE, 2 * SCALE] = lined[SCALE, : 2 * SCALE] = True  # around the only group
    lined[:SCALE, : 2 * SCALE] = True
    assert np.array_equal(tile[~lined], pixels[~lined])
    assert np.abs(tile - pixels)[lined].max() > 20


def test_patches_keep_their_shape(photo):
    sheet = merged_tokens_picture([photo], [[torch.arange(H * W)]], (H, W), patch=(16, 8))
    tile_w, tile_h = (sheet.width - 3 * _GAP) // 2, 3 * 74
    assert tile_w == 4 * 37  # the longer side, 3 * 16 against 4 * 8, is about 224
    assert sheet.height > tile_h + 2 * _GAP
    with pytest.raises(ValueError, match="at least 1, not 0 and 8"):
        merged_tokens_picture([photo], [[torch.arange(H * W)]], (H, W), patch=(0, 8))


def test_fine_grids_get_more_pixels(photo):
    sheet = merged_tokens_picture([photo], [[torch.arange(37 * 37)]], (37, 37))
    assert sheet.width == 3 * _GAP + 2 * 37 * 12


def test_wide_views_stand_below_each_other_and_narrow_ones_leave_their_titles_room(photo):
    red, blue = (Image.new("RGB", (64, 8), colour) for colour in ("red", "blue"))
    groups = torch.zeros(2 * 16, dtype=torch.long)
    sheet = np.asarray(merged_tokens_picture([red, blue], [[groups]] * 2, (2, 16), scale=14))
    assert sheet.shape[1] == 3 * _GAP + 2 * 224
    for column, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        strip = sheet[:, _GAP + column * (224 + _GAP) :][:, :224]
        assert [(strip[row, 0] == colour).all() for row in (-_GAP - 1, -_GAP - 28)] == [True, True]
        assert (strip == colour).all(-1).all(1).sum() == 2 * 28
    narrow = merged_tokens_picture([red], [[groups[:16]]], (16, 1), scale=14, titles=["input", "final: 1 tokens"])
    assert narrow.width > 3 * _GAP + 2 * 14


def test_default_scale_and_grey_images_and_numpy_maps(photo):
    sheet = merged_tokens_picture([photo.convert("L")], [[np.arange(H * W)]], (H, W))
    assert sheet.width == 3 * _GAP + 2 * 224


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": []}, "no images"),
        ({"source_maps": []}, "1 images but 0"),
        ({"source_maps": [[torch.arange(11)]]}, r"shape \[11\].*3 x 4 patches needs \[12\]"),
        ({"source_maps": [[torch.zeros(12)]]}, "float32.*integers"),
        ({"titles": ["input"]}, "1 titles for 2 columns"),
        ({"scale": 1}, "scale must be at least 2"),
        ({"blend": 2.0}, "blend between"),
    ],
)
def test_errors_give_the_numbers(photo, change, part):
    arguments = {"images": [photo], "source_maps": [[torch.arange(12)]], "grid": (H, W)} | change
    with pytest.raises(ValueError, match=part):
        merged_tokens_picture(**arguments)


def test_images_with_different_numbers_of_maps(photo):
    one = torch.arange(12)
    with pytest.raises(ValueError, match="image 1 has 2 source maps, image 0 has 1"):
        merged_tokens_picture([photo, photo], [[one], [one, one]], (H, W))
