"""`pyra visualize`: what the picture shows, from runs and from backbones, and every error in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from pyra.adapters import save_adapter
from pyra.backbones import geometry, wrapped_config, wrapped_schedule
from pyra.backbones.features import source_maps
from pyra.backbones.layers import merging_layers
from pyra.backbones.loading import image_shape, preprocessing
from pyra.errors import ConfigError
from pyra.scripts.main import main
from pyra.tasks.data.decoding import decode_image
from pyra.tasks.data.task import Task, load_task
from pyra.tasks.options import RunOptions
from pyra.tasks.pictures import _GAP
from pyra.tasks.runs import load_run, new_model, save_run
from pyra.tasks.visualize import Visualization, VisualizeOptions, draw, merging_model, visualize

SIZE = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}


def backbone_folder(folder: Path, **changes: Any) -> str:
    """Save a tiny timm model with random weights and return its folder."""
    arguments = {"img_size": 64, **SIZE, **changes}
    torch.manual_seed(0)
    save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **arguments),
        str(folder),
        model_args=arguments,
        safe_serialization=True,
    )
    return str(folder)


def run_folder(folder: Path, backbone: str, method: str, **merging: Any) -> str:
    """Write a run as training leaves it, but for the training."""
    folder.mkdir()
    options = RunOptions(backbone=backbone, method=method, **merging)
    torch.manual_seed(0)
    model = new_model(options, 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "channel_weight" in name:
                weight.normal_()
    save_adapter(model, folder / "adapter")
    save_run(folder, options, Task("pets", ("cat", "dog"), {}))
    return str(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return backbone_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two flat colours with a little noise, wider than high."""
    noise = np.random.default_rng(0).integers(0, 60, (60, 90, 3))
    noise[:, :45] += np.array([150, 20, 20])
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(noise.astype(np.uint8)).save(file)
    return str(file)


def expected(model: torch.nn.Module, photo: str) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
    """The image as the model sees it, and the maps of its patches, each by the way a user would take."""
    height, width = image_shape(model)
    image = Image.open(photo).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    batch = ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)[None]
    prefix = model.num_prefix_tokens
    return image, {layer: groups[0, prefix:] for layer, groups in source_maps(model, batch).items()}


def views(sheet: np.ndarray, columns: int, tile: tuple[int, int]) -> list[np.ndarray]:
    """The tiles of the last image, from the image itself on; wide ones stand below each other."""
    if tile[1] > 2 * tile[0]:
        pitch = (sheet.shape[0] - _GAP) // columns
        return [sheet[(c + 1) * pitch - tile[0] :][: tile[0], _GAP:-_GAP].astype(float) for c in range(columns)]
    pitch = (sheet.shape[1] - _GAP) // columns
    top = sheet.shape[0] - tile[0] - _GAP
    return [sheet[top : top + tile[0], _GAP + c * pitch :][:, : tile[1]].astype(float) for c in range(columns)]


def check_view(view: np.ndarray, image: np.ndarray, groups: np.ndarray) -> None:
    """Unmerged patches are the image, merged ones are tinted by their mean; lines run where groups meet, only there."""
    rows, columns = groups.shape
    high, wide = view.shape[0] // rows, view.shape[1] // columns
    member = groups.repeat(high, axis=0).repeat(wide, axis=1)
    single = {g for g, n in zip(*np.unique(groups, return_counts=True), strict=True) if n == 1}
    wanted = image.copy()
    for group in set(groups.flat) - single:
        wanted[member == group] = 0.75 * image[member == group].mean(0) + 0.25 * image[member == group]
    plain = np.abs(view - wanted).max(-1) < 1
    for row in range(rows):
        for column in range(columns):
            here, top, left = groups[row, column], row * high, column * wide
            assert plain[top + 1 : top + high, left + 1 : left + wide].all()
            for other, line in (
                (groups[row, column - 1] if column else here, plain[top + 1 : top + high, left]),
                (groups[row - 1, column] if row else here, plain[top, left + 1 : left + wide]),
            ):
                if here == other or {here, other} <= single:
                    assert line.all()
                else:
                    assert not line.any()


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({}, (224, 224)),
        ({"class_token": False, "global_pool": "avg"}, (224, 224)),
        ({"reg_tokens": 3}, (224, 224)),
        ({"img_size": [32, 96]}, (76, 228)),  # 4 x 12 patches
        ({"patch_size": [16, 8]}, (224, 224)),  # 4 x 8 patches of a square image
    ],
    ids=["class token", "no prefix", "registers", "wide image", "tall patches"],
)
def test_picture_of_a_backbone(changes: dict[str, Any], tile: tuple[int, int], photo: str, tmp_path: Path) -> None:
    folder = backbone_folder(tmp_path / "vit", **changes)
    options = VisualizeOptions(
        image=photo, backbone=folder, schedule=[4, 0, 9, 3], layers=[1], output=str(tmp_path / "a.png")
    )
    drawn = visualize(options)
    model = merging_model(options)
    image, maps = expected(model, photo)
    sizes, grid = geometry(model), model.patch_embed.grid_size
    assert drawn.prefix_tokens == model.num_prefix_tokens

    assert [(groups.layer, groups.tokens_in, groups.tokens_out) for groups in drawn.layers] == [
        (1, sizes.tokens, sizes.tokens - 4),
        (3, sizes.tokens - 4, sizes.tokens - 13),
        (4, sizes.tokens - 13, sizes.tokens - 16),
    ]
    for groups in drawn.layers:
        patches = maps[groups.layer - 1].unique(return_counts=True)[1]
        assert len(patches) == groups.tokens_out - drawn.prefix_tokens
        assert groups.merged == [int((patches > 1).sum())]
        assert groups.largest == [int(patches.max())]

    with Image.open(options.output) as png:
        assert png.format == "PNG"
        assert png.size == drawn.picture.size
        assert png.width == _GAP + (1 if tile[1] > 2 * tile[0] else 3) * (tile[1] + _GAP)
        sheet = np.asarray(png)
    shown, *tiles = views(sheet, 3, tile)
    seen = np.asarray(image.resize((tile[1], tile[0]), Image.Resampling.BICUBIC)).astype(float)
    assert np.array_equal(shown, seen)
    for view, layer in zip(tiles, (0, 3), strict=True):
        check_view(view, seen, maps[layer].reshape(grid).numpy())
    assert not np.array_equal(*tiles)


def show(model: torch.nn.Module, photo: str, layers: list[int] | None = None) -> Visualization:
    return draw(model, [Image.open(photo)], layers)


def columns(picture: Image.Image) -> int:
    return (picture.width - _GAP) // (224 + _GAP)


def test_default_layers_are_few_and_the_last_is_among_them(backbone: str, photo: str, tmp_path: Path) -> None:
    deep = backbone_folder(tmp_path / "deep", depth=9)
    model = merging_model(VisualizeOptions(image=photo, backbone=deep, rate=0.4))
    assert columns(show(model, photo).picture) == 6
    assert columns(show(model, photo, [2, 2, 9]).picture) == 3
    model = merging_model(VisualizeOptions(image=photo, backbone=backbone, schedule=[0, 5, 0, 0]))
    picture = show(model, photo).picture
    assert columns(picture) == 2, "the layers after the only one that merges show the same"
    unmerged = np.asarray(show(model, photo, [1]).picture)
    tiles = views(unmerged, 3, (224, 224))
    assert np.array_equal(tiles[0], tiles[1]), "before the first merge every patch is the image"
    assert np.array_equal(tiles[2], views(np.asarray(picture), 2, (224, 224))[1])


def test_layers_out_of_range(backbone: str, photo: str) -> None:
    model = merging_model(VisualizeOptions(image=photo, backbone=backbone, rate=0.4))
    with pytest.raises(ConfigError, match=r"--layers must be in 1\.\.4, got 0, 5"):
        show(model, photo, [0, 5])


def test_random_weights_give_the_same_picture_twice(photo: str) -> None:
    options = VisualizeOptions(
        image=photo, backbone="vit_tiny_patch16_224", pretrained=False, image_size=64, rate=0.3, matching="local"
    )
    one, two = (show(merging_model(options), photo) for _ in range(2))
    assert np.array_equal(np.asarray(one.picture), np.asarray(two.picture))
    assert one.layers == two.layers


def test_matching_options_reach_the_model(backbone: str, photo: str) -> None:
    options = VisualizeOptions(
        image=photo, backbone=backbone, rate=0.4, matching="local", threshold=0.5, window=2, pretrained=False
    )
    config = wrapped_config(merging_model(options))
    assert (config.matching, config.threshold, config.window, config.rate) == ("local", 0.5, 2, 0.4)
    pruned = VisualizeOptions(image=photo, backbone=backbone, rate=0.4, matching="prune")
    assert show(merging_model(pruned), photo).layers


def test_a_run_merges_as_it_was_trained(backbone: str, photo: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", backbone, "pyra", schedule=[8, 8, 4, 4])
    model = merging_model(VisualizeOptions(images=photo, run=folder))
    trained = load_run(folder)[0]
    image, maps = expected(trained, photo)
    assert wrapped_schedule(model) == [8, 8, 4, 4]
    assert preprocessing(model).image_size == image.height == 64
    assert [int(groups.largest[0]) for groups in show(model, photo).layers] == [
        int(maps[layer].bincount().max()) for layer in range(4)
    ]


def test_another_rate_keeps_the_trained_reactivation(backbone: str, photo: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", backbone, "pyra", schedule=[8, 0, 4, 4])
    model = merging_model(VisualizeOptions(images=photo, run=folder, schedule=[6, 6, 6, 6]))
    trained = {layer.step.layer: layer for layer in merging_layers(load_run(folder)[0])}
    for layer in merging_layers(model):
        if layer.step.layer == 1:
            assert not layer.reactivation.channel_weight.any(), "no weights were trained here"
        else:
            weights = trained[layer.step.layer].reactivation.channel_weight
            assert torch.equal(layer.reactivation.channel_weight, weights)
            assert weights.any()
    assert wrapped_config(model).reactivation
    assert show(model, photo).layers[-1].tokens_out == 65 - 24
    pruned = merging_model(VisualizeOptions(images=photo, run=folder, matching="prune"))
    assert wrapped_schedule(pruned) == [8, 0, 4, 4]


@pytest.mark.parametrize("method", ["linear", "adapter"])
def test_a_run_without_merging_needs_a_rate(method: str, backbone: str, photo: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", backbone, method)
    with pytest.raises(ConfigError, match=rf"--method {method}\) merges no tokens: give --rate or --schedule"):
        merging_model(VisualizeOptions(images=photo, run=folder))
    model = merging_model(VisualizeOptions(images=photo, run=folder, rate=0.4))
    assert show(model, photo).layers


def test_command_prints_a_table_and_the_file(
    backbone: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "groups.png"
    dark = tmp_path / "dark, really.jpg"
    Image.new("RGB", (30, 50)).save(dark)
    argv = ["visualize", "--backbone", backbone, "--schedule", "8,8,8,8", "--output", str(output)]
    assert main([*argv, photo]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "groups of more than one patch" in lines[0] and "largest group (patches)" in lines[0]
    assert [line.split()[:3] for line in lines[2:6]] == [
        [str(layer + 1), str(65 - 8 * layer), str(57 - 8 * layer)] for layer in range(4)
    ]
    with Image.open(output) as png:
        one = png.size
    assert lines[-1] == f"written to {output} ({one[0]} x {one[1]} pixels)"

    assert main([*argv, photo]) == 2
    assert "already exists: pass --overwrite" in capsys.readouterr().err
    assert main([*argv, "--image", f"{photo},{photo}", "--overwrite"]) == 0
    with Image.open(output) as png:
        assert png.size == (one[0], one[1] + 224 + _GAP)
    assert main([*argv, str(dark), "--overwrite"]) == 0, "a comma in a file's name"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_ranges_of_several_images(backbone: str, photo: str, tmp_path: Path, capsys: Any) -> None:
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 64), "red").save(flat)
    argv = ["--backbone", backbone, "--rate", "0.6", "--output", str(tmp_path / "groups.png")]
    assert main(["visualize", f"{photo},{flat}", *argv]) == 0
    assert " to " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--run", "R", "--backbone", "B"], "exactly one of --run and --backbone"),
        ([], "exactly one of --run and --backbone"),
        (["--image", "x.png", "--backbone", "B", "--rate", "0.5"], "IMAGE or with --image, not both"),
        (["--run", "R", "--checkpoint", "c.npz"], "leave --checkpoint out"),
        (["--run", "R", "--image-size", "32", "--no-pretrained"], "leave --image-size, --no-pretrained out"),
        (["--run", "R", "--rate", "0.5", "--schedule", "1,1"], "--rate or --schedule, not both"),
        (["--run", "R"], "no finished run"),
        (["--backbone", "B"], "--backbone needs --rate or --schedule"),
        (["--backbone", "B", "--rate", "0"], "nothing merges at rate 0"),
        (["--backbone", "B", "--schedule", "0,0,0,0"], "nothing merges at rate 0"),
        (["--backbone", "B", "--rate", "1.5"], r"rate must be a number in [0, 1), got 1.5"),
        (["--backbone", "B", "--rate", "0.5", "--matching", "prune", "--threshold", "0.5"], "give no threshold"),
        (["--backbone", "B", "--rate", "0.5", "--matching", "locl"], "did you mean 'local'"),
        (["--backbone", "B", "--rate", "0.5", "--image-size", "-8"], "--image-size must be at least 1"),
        (["--backbone", "B", "--rate", "0.5", "--image-size", "30"], "30 is not a multiple"),
        (["--backbone", "B", "--schedule", "1,1"], "it has 2 entries, the model has 4 blocks"),
        (["--backbone", "B", "--rate", "0.5", "--layers", "9"], "--layers must be in 1..4, got 9"),
        (["--backbone", "B", "--rate", "0.5", "--checkpoint", "none.npz"], "none.npz"),
        (["--backbone", "vit_tinny_patch16_224", "--rate", "0.5"], "did you mean"),
        (["--backbone", "resnet18", "--no-pretrained", "--rate", "0.5"], "resnet18 cannot be merged"),
        (["--backbone", "swin_tiny_patch4_window7_224", "--no-pretrained", "--rate", "0.5"], "cannot be merged"),
        (["--backbone", "B", "--rate", "0.5", "--output", "groups.jpg"], "must end in .png, got 'groups.jpg'"),
        (["--backbone", "B", "--rate", "0.5", "--output", "missing/g.png"], "no folder missing"),
        (["--backbone", "B", "--rate", "0.5", "--output", "folder.png"], "folder.png is a folder"),
    ],
)
def test_errors_are_one_line(
    argv: list[str],
    part: str,
    backbone: str,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["visualize", photo, *(backbone if word == "B" else word for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyra: error: ") and error.count("\n") == 1
    assert part in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_images_that_are_none(
    backbone: str, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no image")
    Path("cut.png").write_bytes(Path(photo).read_bytes()[:200])
    argv = ["--backbone", backbone, "--rate", "0.5", "--output", "groups.png"]
    for given, part in (
        (["none.jpg"], "none.jpg: no such image"),
        ([f"{photo},none.jpg"], "none.jpg: no such image"),
        (["text.jpg"], "text.jpg cannot be read as an image: not an image in a known format"),
        (["cut.png"], "cut.png cannot be read as an image"),
        (["."], "cannot be read as an image: not a regular file"),
        ([","], "give the image"),
        ([], "give the image as IMAGE or with --image"),
        ([photo, "other.jpg"], "unexpected argument 'other.jpg'"),
    ):
        assert main(["visualize", *given, *argv]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    assert not Path("groups.png").exists()


def test_an_image_is_never_replaced_by_its_picture(
    backbone: str, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(photo).read_bytes()
    argv = ["visualize", photo, "--backbone", backbone, "--rate", "0.5", "--overwrite", "--output", photo]
    assert main(argv) == 2
    assert "is one of the images" in capsys.readouterr().err
    assert Path(photo).read_bytes() == before


def test_help_shows_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["visualize", "--help"])
    text = capsys.readouterr().out
    assert "pyra visualize photo.jpg --run runs/a" in text and "--backbone vit_small" in text


@pytest.mark.assets
def test_groups_follow_what_is_in_the_image(assets: Path, tmp_path: Path) -> None:
    """Two photographs side by side: trained weights keep them apart, random ones merge across by colour alone."""
    rows = load_task(data=str(assets / "caltech101")).splits["test"]
    pairs = []
    for first in range(0, 12, 2):
        pair = Image.new("RGB", (224, 224))
        for half in range(2):
            photo = decode_image(rows[first + half]["image"]["bytes"])
            pair.paste(photo.resize((112, 224)), (112 * half, 0))
        pairs.append(str(tmp_path / f"{first}.png"))
        pair.save(pairs[-1])
    right = torch.arange(256) % 16 >= 8
    mixed = []
    for weights in (
        {"checkpoint": str(assets / "vit_small_patch14_dinov2_saliency.fp16.safetensors")},
        {"pretrained": False},
    ):
        options = VisualizeOptions(
            images=",".join(pairs), backbone="vit_small_patch14_dinov2", image_size=224, rate=0.6, **weights
        )
        model = merging_model(options)
        groups = [expected(model, pair)[1][11] for pair in pairs]
        assert all(
            len(tokens.unique()) == geometry(model).tokens - sum(wrapped_schedule(model)) - 1 for tokens in groups
        )
        halves = [
            (right[tokens == group].sum(), (tokens == group).sum()) for tokens in groups for group in tokens.unique()
        ]
        mixed.append(sum(int(min(share, whole - share)) for share, whole in halves))
    assert mixed[0] < 0.5 * mixed[1]


@pytest.mark.assets
def test_the_default_size_of_a_real_backbone(assets: Path, tmp_path: Path) -> None:
    photo, output = tmp_path / "photo.jpg", tmp_path / "groups.png"
    rows = load_task(data=str(assets / "caltech101")).splits["test"]
    photo.write_bytes(rows[0]["image"]["bytes"])
    checkpoint = str(assets / "vit_small_patch14_dinov2_saliency.fp16.safetensors")
    argv = ["--backbone", "vit_small_patch14_dinov2", "--checkpoint", checkpoint, "--rate", "0.7"]
    assert main(["visualize", "--image", str(photo), *argv, "--output", str(output)]) == 0
    with Image.open(output) as png:
        assert png.width == _GAP + 6 * (37 * 12 + _GAP)
