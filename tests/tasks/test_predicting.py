"""A run and an export as a classifier, and what it answers on files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from colour_model import Model, classifier_of, picture
from PIL import Image

from pyra.errors import ConfigError, DataError, TrainingError
from pyra.tasks.data.task import image_dataset
from pyra.tasks.options import RunOptions
from pyra.tasks.predicting import open_classifier
from pyra.tasks.predicting_files import image_files, predict_files, readable
from pyra.tasks.runs import load_run, task_of_run
from pyra.tasks.training import train


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned enough to give different answers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"epochs": 2, "limit": 40, "batch_size": 8, "image_size": 32, "device": "cpu"}
    train(RunOptions(backbone="demo", output=str(folder), method="pyra", rate=0.5, **settings))  # type: ignore[arg-type]
    return folder


METADATA = {
    "labels": '["red", "green", "blue"]', "image_size": "8", "mean": "0.1 0.2 0.3", "std": "0.5 0.5 0.25",
    "task": "colours", "backbone": "/somewhere/tiny",
}  # fmt: skip

Export = Callable[..., Path]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Write a folder that looks like an export, whose model gives the mean colour; None removes metadata."""

    def make(name: str = "export", run: Any = lambda x: 10 * x.mean((2, 3)), **changes: str | None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "export.json").write_text("{}")
        metadata = {key: text for key, text in {**METADATA, **changes}.items() if text is not None}
        asked: list[dict[str, Any]] = []

        class Opened(SimpleNamespace):
            def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
                return run(pixel_values)

        def load(where: Path, **how: Any) -> Opened:
            asked.append({"folder": where, **how})
            return Opened(format="onnx", runtime="onnxruntime", metadata=metadata, asked=asked)

        monkeypatch.setattr("pyra.export.load_exported", load)
        return folder

    return make


def test_a_run_answers_as_its_evaluation_did(run_folder: Path, tmp_path: Path) -> None:
    model, options, labels = load_run(run_folder)
    task = task_of_run(run_folder, options, labels)
    classifier = open_classifier(run_folder, device="cpu")
    assert (list(classifier.labels), classifier.image_size, classifier.format) == (labels, 32, "run")
    data = image_dataset(
        task, "test", image_size=32, mean=classifier.mean, std=classifier.std, limit=options.limit, cache=False
    )
    for index in range(len(data)):
        (tmp_path / f"{index:02d}.jpg").write_bytes(data.rows[index]["image"]["bytes"])
    predictions, skipped = predict_files(classifier, image_files([str(tmp_path)]), top=3, batch_size=7)
    stored = json.loads((run_folder / "predictions.json").read_text())["predictions"]
    assert [one.index for one in predictions] == stored and len(set(stored)) > 1 and skipped == []
    expected = torch.stack([model(data[i]["pixel_values"][None])[0] for i in range(len(data))]).softmax(-1)
    for one, row in zip(predictions, expected, strict=True):
        assert one.probability == pytest.approx(float(row.max()), abs=1e-5)
        assert one.label == labels[one.index] == one.top[0].label
        assert [score.probability for score in one.top] == sorted(
            (score.probability for score in one.top), reverse=True
        )
        assert len(one.top) == 3 and one.milliseconds > 0
    assert [Path(one.image).name for one in predictions] == [f"{index:02d}.jpg" for index in range(len(data))]


def test_an_export_is_opened_as_asked_and_sees_normalised_squares(export: Export) -> None:
    seen: list[torch.Tensor] = []

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        seen.append(pixel_values.clone())
        return pixel_values.mean((2, 3))

    folder = export(run=run)
    classifier = open_classifier(folder, runtime="onnxruntime", threads=2, trust_code=True)
    asked = classifier.run.asked[0]  # type: ignore[attr-defined]
    assert asked == {"folder": folder, "runtime": "onnxruntime", "threads": 2, "trust_code": True}
    assert classifier.about() == {
        "format": "onnx", "runtime": "onnxruntime", "task": "colours", "backbone": "tiny", "classes": 3, "image_size": 8
    }  # fmt: skip
    pixels = classifier.prepare(Image.open(io.BytesIO(picture("green", (30, 17)))))
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8
    classifier.probabilities(pixels[None])
    expected = [(0 - 0.1) / 0.5, (1 - 0.2) / 0.5, (0 - 0.3) / 0.25]
    torch.testing.assert_close(seen[-1].mean((0, 2, 3)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": None, "std": None}, r"metadata has no labels, std.*pyra export"),
        ({"labels": "red\ngreen\nblue"}, "labels in its metadata is 'red.*not a JSON list of class names"),
        ({"labels": "[1, 2, 3]"}, "not a JSON list of class names"),
        ({"labels": "[]"}, "not a JSON list of class names"),
        ({"image_size": "big"}, "image_size in its metadata is 'big', not a number of pixels"),
        ({"image_size": "9" * 6000}, "not a number of pixels"),
        ({"mean": "0.5 0.5"}, "mean in its metadata is '0.5 0.5', not three numbers"),
        ({"std": "0.5 0.5 0"}, "std in its metadata is '0.5 0.5 0', not three numbers above 0"),
        ({"std": "0.5 nan 0.5"}, "not three numbers above 0"),
        ({"labels": '["red", "green"]'}, r"answers \[1, 3\] to one image, and has 2 class names"),
    ],
)
def test_metadata_that_does_not_do(export: Export, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_classifier(export(**changes))


def test_what_cannot_be_opened(export: Export, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing does not exist: give the folder"):
        open_classifier(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file: give the folder"):
        open_classifier(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no finished run"):
        open_classifier(tmp_path / "empty")
    export("all/onnx")
    export("all/hf")
    with pytest.raises(DataError, match=r"is no export itself, but holds some: name one, .*all/hf, .*all/onnx$"):
        open_classifier(tmp_path / "all")
    with pytest.raises(DataError, match=r"name one, .*all/hf, .*all/onnx$"):
        open_classifier(tmp_path)
    with pytest.raises(ConfigError, match="--device cuda: an export runs on the CPU"):
        open_classifier(tmp_path / "all" / "onnx", device="cuda")
    with pytest.raises(ConfigError, match="--runtime openvino: a run opens in pytorch only"):
        open_classifier(run_folder, runtime="openvino")
    with pytest.raises(ConfigError, match="--threads must be a positive number, got 0"):
        open_classifier(run_folder, threads=0)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        open_classifier(export("nan", run=lambda x: x.mean((2, 3)) * float("nan")))


# files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "images"
    (home / "more").mkdir(parents=True)
    (home / "b.png").write_bytes(picture("green"))
    (home / "a.PNG").write_bytes(picture("red"))
    (home / "more" / "c.jpg").write_bytes(picture("blue", form="JPEG"))
    (home / "notes.txt").write_text("no image")
    (home / ".hidden.png").write_bytes(picture())
    return home


def test_files_and_folders_in_order(folder: Path) -> None:
    (folder.parent / "odd name").write_bytes(picture("blue"))
    files = image_files([str(folder.parent / "odd name"), str(folder), str(folder / "b.png")])
    assert [file.name for file in files] == ["odd name", "a.PNG", "b.png", "c.jpg", "b.png"]
    predictions, _ = predict_files(classifier_of(Model()), files, batch_size=2)
    assert [one.label for one in predictions] == ["blue", "red", "green", "blue", "green"]
    with pytest.raises(DataError, match=r"no such images: .*x\.png, .*y\.png"):
        image_files([str(folder), str(folder / "x.png"), str(folder / "y.png")])
    (folder / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing holds no images"):
        image_files([str(folder / "nothing")])


def test_orientation_and_transparency_as_in_evaluation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright = Image.new("RGB", (20, 10), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 10, 10))
    upright.save(tmp_path / "turned.png", exif=exif)
    classifier = classifier_of(Model())
    seen: list[torch.Tensor] = []
    watched = type(classifier)(**{**vars(classifier), "run": lambda x: (seen.append(x), x.mean((2, 3)))[1]})
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    predict_files(watched, [tmp_path / "turned.png", tmp_path / "clear.png"])
    turned, clear = seen[0]
    assert turned[2, 0].min() > 0.9 and turned[0, -1].min() > 0.9  # blue above, red below
    assert clear.min() == 1  # over white


@pytest.mark.parametrize("damage", ["no image", "truncated", "a bomb"])
def test_a_damaged_file_is_named_or_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    broken = folder / "broken.png"
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(noise, "PNG")
    broken.write_bytes(
        b"nothing" if damage == "no image" else noise.getvalue()[: 3000 if damage == "truncated" else None]
    )
    if damage == "a bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    files, model = image_files([str(folder)]), Model()
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read: .*broken\.png: .*--skip-broken") as caught:
        predict_files(classifier_of(model), files)
    assert "\n" not in str(caught.value) and model.batches == []
    predictions, skipped = predict_files(classifier_of(model), files, batch_size=2, skip_broken=True)
    assert [one.label for one in predictions] == ["red", "green", "blue"]
    assert [Path(one.image).name for one in skipped] == ["broken.png"] and skipped[0].reason
    if damage != "truncated":  # the first bytes tell
        with pytest.raises(DataError, match=r"broken\.png"):
            readable(files)
        good, out = readable(files, skip_broken=True)
        assert len(good) == 3 and [Path(one.image).name for one in out] == ["broken.png"]


def test_numbers_below_one_are_all_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--top must be at least 1, got 0; --batch-size must be at least 1, got -1"):
        predict_files(classifier_of(Model()), [folder / "b.png"], top=0, batch_size=-1)
