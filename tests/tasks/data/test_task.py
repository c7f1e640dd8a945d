import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image, UnidentifiedImageError

from pyra.errors import ConfigError, DataError
from pyra.tasks import demo as shipped
from pyra.tasks.data import images
from pyra.tasks.data.cards import load_card
from pyra.tasks.data.decoding import decode_image
from pyra.tasks.data.task import image_dataset, load_task, task_names
from pyra.tasks.data.validation import validate_data
from pyra.tasks.options import RunOptions
from pyra.tasks.training import warn_of_shared

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLASSES = ["cat", "dog"]


def encoded(colour=(200, 30, 30), size=(12, 8), form="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **options)
    return buffer.getvalue()


def write_parquet(path, labels, names=CLASSES, payloads=None, image="image", label="label", paths=None):
    payloads = payloads or [encoded((i % 256, 0, 0)) for i in range(len(labels))]
    paths = paths or [f"{i}.png" for i in range(len(labels))]
    columns = {image: [{"bytes": b, "path": p} for b, p in zip(payloads, paths, strict=True)], label: labels}
    label_type = datasets.ClassLabel(names=names) if names else datasets.Value(type_of(labels))
    features = datasets.Features({image: datasets.Image(decode=False), label: label_type})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path)


def type_of(labels):
    return "string" if labels and isinstance(labels[0], str) else "int64"


def write_images(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i:02d}.png").write_bytes(encoded((i * 10, 0, 0)))


def labels_of(task, split):
    return task.splits[split]["label"][:]


# the demo task


@pytest.fixture(scope="module")
def demo():
    return load_task("demo")


def test_demo_has_100_training_images_a_class_and_the_whole_test_split(demo):
    assert set(Counter(labels_of(demo, "train")).values()) == {100}
    assert [Counter(labels_of(demo, "test"))[c] for c in range(10)] == [15, 12, 72, 38, 42, 26, 73, 30, 12, 52]
    assert len(demo.splits["validation"]) == 341
    assert demo.labels == (
        "dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt",
    )  # fmt: skip


def test_demo_splits_share_no_image(demo):
    digests = {
        split: {hashlib.sha256(image["bytes"]).digest() for image in rows["image"]}
        for split, rows in demo.splits.items()
    }
    assert len(set.union(*digests.values())) == sum(map(len, digests.values())) == 1000 + 341 + 372


def test_demo_becomes_normalised_tensors(demo):
    data = image_dataset(demo, "test", image_size=32, **HALF, limit=20)
    values = torch.stack([data[i]["pixel_values"] for i in range(20)])
    assert values.shape == (20, 3, 32, 32) and values.dtype == torch.float32
    assert values.amin() >= -1 and values.amax() <= 1 and values.std() > 0.2
    assert [data[i]["labels"] for i in range(20)] == data.labels and len(set(data.labels)) > 3
    assert min(data.image(0).size) <= 112 and data.image(0).mode == "RGB"


def test_demo_data_fits_the_package():
    folder = os.path.dirname(shipped.__file__)
    assert (
        sum(os.path.getsize(f"{folder}/{name}") for name in os.listdir(folder) if name.endswith(".parquet"))
        <= 8 * 2**20
    )


def test_every_shipped_task_loads_under_its_name():
    assert "demo" in task_names()
    for name in task_names():
        if not load_card(name)[0].brings_its_data:
            continue
        task = load_task(name)
        assert task.name == name and task.description and task.license != "unknown"


def test_unknown_task_gets_a_suggestion_and_the_list():
    with pytest.raises(DataError, match=r"'demmo' \(did you mean 'demo'\?\); the tasks are"):
        load_task("demmo")


@pytest.mark.parametrize("arguments", [{}, {"task": "demo", "data": "x"}])
def test_exactly_one_of_task_and_data(arguments):
    with pytest.raises(DataError, match="exactly one of --task and --data"):
        load_task(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"metric": None}, "key 'metric' is missing"),
        ({"classes": 3}, "has 3 classes, its files have 2"),
        ({"preprocessing": "crop"}, "preprocessing 'crop' is not one of squash"),
    ],
)
def test_task_card_is_checked(tmp_path, monkeypatch, change, message):
    write_parquet(tmp_path / "mine" / "train.parquet", [0, 1])
    write_parquet(tmp_path / "mine" / "test.parquet", [0, 1])
    card = {
        "name": "mine", "description": "d", "source": "s", "license": "l", "version": "1", "classes": 2,
        "metric": "accuracy", "higher_is_better": True, "preprocessing": "squash",
        "files": {"train": "train.parquet", "test": "test.parquet"},
    }  # fmt: skip
    monkeypatch.setattr("pyra.tasks.data.cards._root", lambda: tmp_path)
    file = tmp_path / "mine" / "task.yaml"
    file.write_text(yaml.safe_dump(card))
    assert load_task("mine").labels == ("cat", "dog")
    file.write_text(yaml.safe_dump({key: value for key, value in (card | change).items() if value is not None}))
    with pytest.raises(DataError, match=message):
        load_task("mine")


# folders of parquet files


@pytest.mark.parametrize("inside", ["", "data"])
def test_parquet_folder(tmp_path, inside):
    folder = tmp_path / "pets"
    write_parquet(folder / inside / "train-00000-of-00002.parquet", [0, 1, 1])
    write_parquet(folder / inside / "train-00001-of-00002.parquet", [0])
    write_parquet(folder / inside / "validation.parquet", [1])
    write_parquet(folder / inside / "test.parquet", [1, 0])
    task = load_task(data=str(folder))
    assert task.name == "pets" and task.labels == ("cat", "dog")
    assert {split: labels_of(task, split) for split in task.splits} == {
        "train": [0, 1, 1, 0],
        "validation": [1],
        "test": [1, 0],
    }
    assert task.splits["train"][3]["source"] == "train-00001-of-00002.parquet row 0 (0.png)"


def test_vtab_names_train_on_all_thousand(tmp_path):
    write_parquet(tmp_path / "train800.parquet", [0, 1, 1])
    write_parquet(tmp_path / "val200.parquet", [0])
    write_parquet(tmp_path / "test.parquet", [1])
    task = load_task(data=str(tmp_path))
    assert {split: labels_of(task, split) for split in task.splits} == {
        "train": [0, 1, 1, 0], "train800": [0, 1, 1], "val200": [0], "test": [1],
    }  # fmt: skip
    write_parquet(tmp_path / "train800val200.parquet", [1, 1, 1, 1])
    assert labels_of(load_task(data=str(tmp_path)), "train") == [1, 1, 1, 1]


def test_vtab_names_without_a_test_split_never_evaluate_on_training_images(tmp_path):
    write_parquet(tmp_path / "train800.parquet", [0, 1, 1])
    write_parquet(tmp_path / "val200.parquet", [0])
    task = load_task(data=str(tmp_path))
    assert labels_of(task, "train") == [0, 1, 1] and labels_of(task, "test") == [0]


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "val.parquet", [1])
    task = load_task(data=str(tmp_path))
    assert labels_of(task, "test") == [1] and "no test split" in task.description


@pytest.mark.parametrize(
    ("train", "test", "names", "labels", "numbers"),
    [
        (["dog", "cat"], ["dog"], (None, None), ("cat", "dog"), [1]),
        ([10, 2], [10], (None, None), ("2", "10"), [1]),
        ([0, 1], [0], (["cat", "dog"], ["dog", "cat"]), ("cat", "dog"), [1]),
        ([0, 1], ["dog"], (["cat", "dog"], None), ("cat", "dog"), [1]),
    ],
    ids=["strings", "integers", "two numberings", "names and strings"],
)
def test_label_columns(tmp_path, train, test, names, labels, numbers):
    write_parquet(tmp_path / "train.parquet", train, names[0], image="picture", label="category")
    write_parquet(tmp_path / "test.parquet", test, names[1], image="picture", label="category")
    task = load_task(data=str(tmp_path))
    assert task.labels == labels and labels_of(task, "test") == numbers


def test_columns_are_found_without_the_metadata_of_datasets(tmp_path):
    photos = [{"bytes": encoded(), "path": None}] * 2
    table = pa.table({"id": [7, 8], "photo": photos, "label": ["cat", "dog"]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = image_dataset(load_task(data=str(tmp_path)), "test", image_size=4, **HALF)
    assert data.source(1) == "test.parquet row 1" and len(data) == 2


def test_a_single_parquet_file_is_divided(tmp_path):
    write_parquet(tmp_path / "all.parquet", [0, 1] * 10)
    task = load_task(data=str(tmp_path / "all.parquet"))
    assert task.name == "all" and Counter(labels_of(task, "test")) == {0: 2, 1: 2}


def broken_folder(tmp_path, case):
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    if case != "no training split":
        write_parquet(train, [0, 1])
    if case not in ("no evaluation split", "two candidates"):
        write_parquet(test, [0])
    match case:
        case "two candidates":
            write_parquet(tmp_path / "train_small.parquet", [0])
        case "unknown label":
            write_parquet(test, [0, 2], ["cat", "dog", "fox"])
        case "empty split":
            write_parquet(test, [])
        case "no image column":
            pq.write_table(pa.table({"text": ["a"], "label": [0]}), train)
        case "no label column":
            pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "size": [0]}), train)
        case "missing label":
            write_parquet(test, [0, -1])
        case "label out of range":
            write_parquet(test, [0, 7])
        case "label of another type":
            pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "label": [0.5]}), train)
        case "not parquet":
            train.write_bytes(b"PAR1 no")
        case "broken metadata":
            table = pq.read_table(train).replace_schema_metadata({"huggingface": "{nonsense"})
            pq.write_table(table, train)
        case "one class":
            write_parquet(train, [0, 0], ["cat"])
            write_parquet(test, [0], ["cat"])
        case "image elsewhere":
            write_parquet(train, [0, 1], payloads=[encoded(), None], paths=["a.png", "../outside.png"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no training split", r"no training split \(found test\): add train\*.parquet"),
        ("no evaluation split", r"no evaluation split: add test\*.parquet"),
        ("two candidates", r"train.parquet, train_small.parquet could each be the train split"),
        (
            "unknown label",
            r"not in the training split: 'fox' \(test.parquet row 1 \(1.png\)\); its classes are cat, dog",
        ),
        ("empty split", "split test is empty"),
        ("no image column", r"train.parquet has no image column .* its columns are text, label"),
        ("no label column", r"train.parquet has no label column .* its columns are image, size"),
        ("missing label", r"test.parquet: 1 rows have no label, the first is row 1"),
        ("label out of range", "test.parquet row 1: label 7 is outside the 2 classes"),
        ("label of another type", "labels are float; they must be integers or strings"),
        ("not parquet", r"train.parquet cannot be read as parquet"),
        ("broken metadata", "train.parquet: its description of the columns .* is broken"),
        ("one class", r"a single class \(cat\)"),
        ("image elsewhere", r"row 1 points to ../outside.png, outside"),
    ],
)
def test_unusable_parquet_folder(tmp_path, case, message):
    broken_folder(tmp_path, case)
    with pytest.raises(DataError, match=message):
        load_task(data=str(tmp_path))


def test_no_file_is_named_like_a_split(tmp_path):
    write_parquet(tmp_path / "all.parquet", [0, 1])
    with pytest.raises(DataError, match=r"no file named train\*.parquet.*only all.parquet"):
        load_task(data=str(tmp_path))


def test_path_that_does_not_exist_or_is_no_data(tmp_path):
    with pytest.raises(DataError, match=r"pets does not exist \(.* exists\)"):
        load_task(data=str(tmp_path / "pets"))
    with pytest.raises(DataError, match=r"is empty: no parquet files and no images"):
        load_task(data=str(tmp_path))
    with pytest.raises(DataError, match="--data is empty"):
        load_task(data=" ")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder nor a parquet file"):
        load_task(data=str(tmp_path / "notes.txt"))


def test_images_stored_as_paths_lie_beside_the_parquet_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dog.png").write_bytes(encoded((9, 9, 9)))
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 1], payloads=[encoded(), None], paths=["x", "pictures/dog.png"])
    data = image_dataset(load_task(data=str(tmp_path)), "test", image_size=4, **HALF)
    assert data.image(1).getpixel((0, 0)) == (9, 9, 9)


def test_a_row_without_an_image_is_a_broken_one(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    payloads = [encoded(), None, encoded()]
    write_parquet(tmp_path / "test.parquet", [0, 1, 1], payloads=payloads, paths=["x", None, "y"])
    task = load_task(data=str(tmp_path))
    with pytest.raises(DataError, match="row 1: the row holds no image"):
        image_dataset(task, "test", image_size=4, **HALF)
    assert len(image_dataset(task, "test", image_size=4, **HALF, skip_broken=True)) == 2


def test_skipping_never_loses_a_whole_class(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 1, 1], payloads=[encoded(), b"no", b"no"])
    task = load_task(data=str(tmp_path))
    with pytest.raises(DataError, match=r"no image of dog can be read, for example test\.parquet row 1"):
        image_dataset(task, "test", image_size=4, **HALF, skip_broken=True)


def test_missing_shards_are_named(tmp_path):
    write_parquet(tmp_path / "test.parquet", [0, 1])
    for number in (0, 2):
        write_parquet(tmp_path / f"train-0000{number}-of-00003.parquet", [0, 1])
    with pytest.raises(DataError, match=r"1 of 3 shards are missing, the first is train-00001-of-00003\.parquet"):
        load_task(data=str(tmp_path))
    write_parquet(tmp_path / "train-00001-of-00003.parquet", [0, 1])
    assert len(load_task(data=str(tmp_path)).splits["train"]) == 6


# folders of images


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat"], r"a single class \(cat\)"),
        (["pets/train/cat", "pets/train/dog", "cars/train/red"], "lie deeper.*give the folder above the classes"),
    ],
)
def test_a_folder_at_the_wrong_level(tmp_path, folders, message):
    for folder in folders:
        write_images(tmp_path / folder, {".": 3})
    with pytest.raises(DataError, match=message):
        load_task(data=str(tmp_path))


def test_a_class_folder_without_images_is_named(tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no readable images in the class folder fox"):
        load_task(data=str(tmp_path))


def test_image_folder_with_long_split_names(tmp_path):
    write_images(tmp_path / "training", {"dog": 3, "cat": 2})
    write_images(tmp_path / "Testing", {"dog": 1})
    assert sorted(load_task(data=str(tmp_path)).splits) == ["test", "train"]


def test_image_folder_with_splits(tmp_path):
    write_images(tmp_path / "train", {"dog": 3, "cat": 2})
    write_images(tmp_path / "test", {"dog": 1})
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    task = load_task(data=str(tmp_path))
    assert task.labels == ("cat", "dog")
    assert labels_of(task, "train") == [0, 0, 1, 1, 1] and labels_of(task, "test") == [1]
    data = image_dataset(task, "train", image_size=4, **HALF)
    assert data.source(2).endswith(os.path.join("dog", "00.png")) and data.image(0).size == (12, 8)


def test_image_folder_without_splits_is_divided_by_class_and_always_the_same_way(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 5, "fox": 1})
    first, second = load_task(data=str(tmp_path)), load_task(data=str(tmp_path))
    assert Counter(labels_of(first, "train")) == {0: 8, 1: 4, 2: 1} and Counter(labels_of(first, "test")) == {
        0: 2,
        1: 1,
    }
    assert first.splits["test"]["source"][:] == second.splits["test"]["source"][:]
    assert not set(first.splits["test"]["source"]) & set(first.splits["train"]["source"])
    assert "80/20 by class (seed 0)" in first.description


@pytest.mark.parametrize("name", [b"caf\xe9.png", "ü".encode() + b"\xff.png"])
def test_names_that_are_not_utf_8_are_told(tmp_path, name):
    write_images(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "cat" / os.fsdecode(name)).write_bytes(encoded())
    with pytest.raises(DataError, match="is not UTF-8: rename the file"):
        load_task(data=str(tmp_path))


def test_unusable_image_folders(tmp_path):
    write_images(tmp_path / "a" / "train", {"cat": 1})
    with pytest.raises(DataError, match=r"no evaluation split: .* test/"):
        load_task(data=str(tmp_path / "a"))
    write_images(tmp_path / "a" / "test", {"fox": 1})
    with pytest.raises(DataError, match=r"not in the training split: 'fox' \(.*00.png\)"):
        load_task(data=str(tmp_path / "a"))
    write_images(tmp_path / "b" / "test", {"cat": 1})
    with pytest.raises(DataError, match="no training split: add a folder train/"):
        load_task(data=str(tmp_path / "b"))
    write_images(tmp_path / "c", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="too few images to divide"):
        load_task(data=str(tmp_path / "c"))


def test_loading_leaves_nothing_behind(tmp_path, monkeypatch):
    data, cwd = tmp_path / "data", tmp_path / "cwd"
    write_images(data, {"cat": 2, "dog": 2})
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cwd / "cache"))
    image_dataset(load_task(data=str(data)), "test", image_size=4, **HALF)
    image_dataset(load_task("demo"), "test", image_size=4, **HALF, limit=2)
    assert os.listdir(cwd) == [] and sorted(os.listdir(data)) == ["cat", "dog"]


# unreadable images

PAYLOADS = {
    "truncated": encoded(size=(64, 64), form="JPEG")[:-200],
    "no bytes": b"",
    "not an image": b"<html>404</html>",
}


@pytest.fixture
def damaged(tmp_path):
    good = [encoded((i * 20, 0, 0)) for i in range(4)]
    paths = ["a.png", "truncated.jpg", "b.png", "empty.jpg", "c.png", "page.jpg", "d.png"]
    payloads = [
        good[0],
        PAYLOADS["truncated"],
        good[1],
        PAYLOADS["no bytes"],
        good[2],
        PAYLOADS["not an image"],
        good[3],
    ]
    write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1, 1, 1, 0], payloads=payloads, paths=paths)
    write_parquet(tmp_path / "test.parquet", [0], payloads=[PAYLOADS["truncated"]])
    return load_task(data=str(tmp_path))


@pytest.fixture(params=["in memory", "on access"])
def storage(request, monkeypatch):
    if request.param == "on access":
        monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    return request.param


def test_unreadable_images_are_named_and_counted(damaged, storage):
    with pytest.raises(DataError) as error:
        image_dataset(damaged, "train", image_size=4, **HALF)
    message = str(error.value)
    assert "3 of 7 images cannot be read: train.parquet row 1 (truncated.jpg)" in message
    assert (
        "train.parquet row 3 (empty.jpg): not an image in a known format" in message
        and "row 5 (page.jpg)" in message
        and "--skip-broken" in message
    )


def test_skip_broken_leaves_them_out_and_lists_them(damaged, storage):
    data = image_dataset(damaged, "train", image_size=4, **HALF, skip_broken=True)
    assert len(data) == 4 and data.labels == [0, 0, 1, 0] and len(data.broken) == 3
    assert data.broken[0].startswith("train.parquet row 1 (truncated.jpg): ")
    reds = [round(float(data[i]["pixel_values"][0].mean() + 1) * 127.5) for i in range(4)]
    assert reds == [0, 20, 40, 60]
    assert [data.source(i)[-6:] for i in range(4)] == ["a.png)", "b.png)", "c.png)", "d.png)"]


def test_a_split_of_nothing_but_broken_images_is_an_error(damaged):
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        image_dataset(damaged, "test", image_size=4, **HALF, skip_broken=True)


def test_unreadable_file_in_an_image_folder_is_named_by_its_path(tmp_path):
    write_images(tmp_path / "train", {"cat": 2, "dog": 1})
    write_images(tmp_path / "test", {"cat": 1})
    (tmp_path / "train" / "cat" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read: .*train.cat.01\.png"):
        image_dataset(load_task(data=str(tmp_path)), "train", image_size=4, **HALF)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), 700).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="32-bit pixels"):
        decode_image(buffer.getvalue())


def test_a_bomb_that_pillow_refuses_is_told_in_the_same_words(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow raises by itself from twice that on
    with pytest.raises(Image.DecompressionBombError, match=r"^120 pixels, more than the 50 allowed$"):
        decode_image(encoded(size=(12, 10)))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError):
        decode_image(encoded(size=(12, 10)))


# the tensors


def test_both_storages_give_the_pixels_of_pillow(tmp_path, storage):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [1], payloads=[buffer.getvalue()])
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    data = image_dataset(
        load_task(data=str(tmp_path)), "train", image_size=8, mean=mean, std=std, interpolation="bilinear"
    )
    expected = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR)).astype(np.float64) / 255
    expected = ((expected - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    for _ in range(2):  # reading an item must not change what is stored
        np.testing.assert_allclose(data[0]["pixel_values"].numpy(), expected, atol=1e-5)


def test_decoding_is_deterministic_and_limit_draws_the_same_images(demo):
    one, two = (image_dataset(demo, "train", image_size=16, **HALF, limit=40) for _ in range(2))
    assert all(torch.equal(one[i]["pixel_values"], two[i]["pixel_values"]) for i in range(40))
    assert one.labels == two.labels and len(set(one.labels)) > 5


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    value = {
        "L": 100,
        "LA": (100, 255),
        "P": 100,
        "RGBA": (100, 100, 100, 255),
        "1": 1,
        "I;16": 100 * 257,
        "CMYK": (0, 0, 0, 155),
    }
    image = Image.new(mode, (4, 4), value[mode])
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode_image(buffer.getvalue())
    assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == ((255,) * 3 if mode == "1" else (100,) * 3)


def test_transparency_is_laid_over_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    assert decode_image(encoded(size=(12, 8), form="JPEG", exif=exif)).size == (8, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"split": "tset"},
            DataError,
            r"no split 'tset' \(did you mean 'test'\?\); its splits are train, validation, test",
        ),
        ({"limit": 0}, DataError, "limit is 0"),
        ({"interpolation": "cubic"}, ConfigError, r"unknown interpolation 'cubic' \(did you mean 'bicubic'\?\)"),
        ({"image_size": 0}, ConfigError, "image_size is 0"),
    ],
)
def test_wrong_arguments(demo, arguments, error, message):
    with pytest.raises(error, match=message):
        image_dataset(demo, **({"split": "test", "image_size": 8} | HALF | arguments))


@pytest.mark.assets
def test_caltech101_has_101_classes_and_a_thousand_training_images(assets):
    task = load_task(data=str(assets / "caltech101"))
    assert len(task.labels) == 101
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 1000, "train800": 800, "val200": 200, "test": 1500,
    }  # fmt: skip


def test_postscript_is_not_an_image() -> None:
    """Pillow would start Ghostscript on it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(UnidentifiedImageError):
        decode_image(buffer.getvalue())


def test_a_pipe_called_an_image_is_told_and_never_waited_for(tmp_path: Path) -> None:
    for number in range(4):
        for colour in ("red", "blue"):
            (tmp_path / colour).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, len(colour))).save(tmp_path / colour / f"{number}.png")
    os.mkfifo(tmp_path / "red" / "x.png")
    checked = validate_data(str(tmp_path))
    assert str(checked.error).endswith("x.png: not a regular file")


def test_the_same_images_in_training_and_test_split_are_told(tmp_path: Path) -> None:
    for number in range(4):
        for split in ("train", "test"):
            file = tmp_path / split / ("red", "blue")[number % 2] / f"{split}{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, number if split == "test" and number < 2 else 9)).save(file)
    (note,) = [note for note in validate_data(str(tmp_path)).notes if "byte for byte" in note]
    assert note.startswith("2 of 4 test images are in the training split, too")
    with pytest.warns(UserWarning, match="2 of 4 test images"):
        warn_of_shared(RunOptions(data=str(tmp_path), method="lora"), load_task(data=str(tmp_path)))
