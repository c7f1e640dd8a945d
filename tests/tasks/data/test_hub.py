"""Data sets of the hub, from files that lie here: only the one function that fetches is replaced."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pyra.errors import ConfigError, DataError
from pyra.tasks.data import hub
from pyra.tasks.data.columns import Columns
from pyra.tasks.data.hub import HubId
from pyra.tasks.data.task import image_dataset, load_task
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import task_for

Write = Callable[..., None]


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 0)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a split as a parquet file; ``owner/name`` is then these files."""
    folder = tmp_path / "published" / "data"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def write(split: str, labels: list[Any], kind: Any = None, columns: dict[str, Any] | None = None) -> None:
        names = columns or {"image": "image", "label": "label"}
        features = {names["image"]: datasets.Image(decode=False), names["label"]: kind or datasets.ClassLabel(2)}
        values: dict[str, Any] = {
            names["image"]: [{"bytes": picture(i), "path": f"{i}.png"} for i in range(len(labels))],
            names["label"]: labels,
        }
        for name, (feature, column) in names.get("more", {}).items():
            features[name], values[name] = feature, column
        made = datasets.Dataset.from_dict(values, features=datasets.Features(features))
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")

    def fetch(source: HubId) -> Any:
        assert source.repository in ("owner/name", "uoft-cs/cifar100")
        return datasets.load_dataset(str(folder.parent), source.config, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(hub, "fetch", fetch)
    return write


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("a-b/c.d_e@v1.0", ("a-b/c.d_e", None, "v1.0")),
        ("owner/name:small@refs/pr/1", ("owner/name", "small", "refs/pr/1")),
    ],
)
def test_ids(text: str, parts: tuple[str, str | None, str | None]) -> None:
    found = HubId.parse(text)
    assert found == HubId(*parts) and str(found) == text


@pytest.mark.parametrize("text", ["name", "a/b/c", "/a/b", "../b", "a/", "a b/c", "~/x", "./x", "a/b@", "ü/b"])
def test_no_ids(text: str) -> None:
    assert HubId.parse(text) is None


def test_splits_by_name_and_labels_of_a_class_label(published: Write) -> None:
    published("train", [0, 1, 1])
    published("validation", [1])
    published("test", [1, 0])
    task = load_task(data="owner/name")
    assert task.name == "name" and task.labels == ("0", "1") and sorted(task.splits) == ["test", "train", "validation"]
    assert task.splits["train"]["label"][:] == [0, 1, 1] and task.source == "owner/name of the Hugging Face hub"
    data = image_dataset(task, "test", image_size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert data.image(1).getpixel((0, 0)) == (1, 0, 0) and data.source(1) == "owner/name test row 1 (1.png)"


def test_text_labels_and_other_names(published: Write) -> None:
    columns = {"image": "photo", "label": "category"}
    published("train", ["dog", "cat", "dog"], datasets.Value("string"), columns)
    published("test", ["dog"], datasets.Value("string"), columns)
    task = load_task(data="owner/name")
    assert task.labels == ("cat", "dog") and task.splits["train"]["label"][:] == [1, 0, 1]


def test_a_single_split_is_divided(published: Write) -> None:
    published("train", [0, 1] * 10)
    task = load_task(data="owner/name")
    assert Counter(task.splits["test"]["label"][:]) == {0: 2, 1: 2} and "80/20" in task.description


def test_two_label_columns_have_to_be_told_apart(published: Write) -> None:
    coarse = {"coarse": (datasets.ClassLabel(3), [2, 0])}
    for split in ("train", "test"):
        published(split, [0, 1], None, {"image": "img", "label": "fine", "more": coarse})
    with pytest.raises(DataError, match=r"owner/name train has the label columns fine, coarse: name one with"):
        load_task(data="owner/name")
    options = RunOptions(rate=0.5, data="owner/name", label_column="coarse")
    assert task_for(options).splits["train"]["label"][:] == [2, 0]
    with pytest.raises(DataError, match=r"'course' is not among its columns \(did you mean 'coarse'"):
        load_task(data="owner/name", columns=Columns(label="course"))
    with pytest.raises(ConfigError, match="--label-column goes with --data"):
        RunOptions(rate=0.5, label_column="coarse")


def test_two_image_columns_have_to_be_told_apart(published: Write) -> None:
    seven = [{"bytes": picture(7), "path": None}] * 2
    mask = {"mask": (datasets.Image(decode=False), seven)}
    for split in ("train", "test"):
        published(split, [0, 1], None, {"image": "pixels", "label": "label", "more": mask})
    with pytest.raises(DataError, match=r"has the image columns pixels, mask: name one with --image-column pixels"):
        load_task(data="owner/name")
    task = load_task(data="owner/name", columns=Columns(image="mask"))
    assert task.splits["train"][0]["image"]["bytes"] == picture(7)
    with pytest.raises(DataError, match=r"--image-column 'label' is no image column; it could be pixels, mask"):
        load_task(data="owner/name", columns=Columns(image="label"))
    for split in ("train", "test"):  # one of them says what it is
        published(split, [0, 1], None, {"image": "image", "label": "label", "more": mask})
    assert load_task(data="owner/name").splits["train"][0]["image"]["bytes"] == picture(0)


def test_wrong_columns_and_splits(published: Write) -> None:
    published("other", [0, 1])
    with pytest.raises(DataError, match="owner/name of the Hugging Face hub has no split called train or test"):
        load_task(data="owner/name")
    published("test", [0, 1])
    with pytest.raises(DataError, match="has no training split"):
        load_task(data="owner/name")
    published("train", [0.5, 1.0], datasets.Value("float32"))
    published("test", [0.5, 1.0], datasets.Value("float32"))
    with pytest.raises(DataError, match="owner/name train: labels are float; they must be integers or strings"):
        load_task(data="owner/name")


def test_a_folder_here_wins(published: Write, tmp_path: Path) -> None:
    published("train", [0, 1])
    published("test", [0, 1])
    for name in ("a", "b", "c"):
        (tmp_path / "owner" / "name" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "owner" / "name" / name / f"{i}.png").write_bytes(picture(i))
    assert load_task(data="owner/name").labels == ("a", "b", "c")


def test_images_that_are_paths_stay_in_the_caches(
    published: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2, "label": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    made = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(hub, "fetch", lambda _: {"train": made, "test": made})
    with pytest.raises(DataError, match=r"owner/name train row 0 points to .*secret.png, outside"):
        load_task(data="owner/name")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path))
    assert len(load_task(data="owner/name").splits["train"]) == 2


# what cannot be fetched: the real library, offline


def test_a_hub_that_cannot_be_reached_says_what_would_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYRA_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load_task(data="owner/name")
    message = str(caught.value)
    assert message.startswith(
        "owner/name is no folder here, and owner/name cannot be fetched from the Hugging Face hub"
    )
    assert (
        "HF_HUB_OFFLINE is set" in message and r"train*.parquet and test*.parquet (columns image and label)" in message
    )
    with pytest.raises(DataError) as caught:
        load_task("cifar100")
    message = str(caught.value)
    assert "uoft-cs/cifar100 cannot be fetched" in message and "for a local copy give --root FOLDER" in message
    assert "cifar100/ with train800.txt, val200.txt, test.txt" in message and "\n" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route"), r"cannot be fetched from the Hugging Face hub \(HF_HUB_OFFLINE is set"),
        (datasets.exceptions.DatasetNotFoundError("x doesn't exist"), "no such public data set"),
        (datasets.exceptions.DatasetNotFoundError("Dataset x is a gated dataset"), "it is gated: accept its terms"),
        (RuntimeError("odd\nvery"), r"hub \(odd\)"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['digits', 'full']"),
            "has the configurations digits, full: name one, as owner/name:digits",
        ),
        (
            ValueError("BuilderConfig 'dig' not found. Available: ['digits', 'full']"),
            "digits, full",
        ),
    ],
)
def test_what_the_library_raises_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: HubId) -> None:
        raise error

    monkeypatch.setattr(hub, "fetch", fail)
    with pytest.raises(DataError, match=said) as caught:
        load_task(data="owner/name")
    assert "\n" not in str(caught.value)


def test_real_configurations_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the pattern against what the installed library says."""
    folder = tmp_path / "two"
    for name in ("digits", "full"):
        (folder / name).mkdir(parents=True)
        made = datasets.Dataset.from_dict({"label": ["a", "b"]})
        made.to_parquet(folder / name / "train.parquet")
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("digits", "full"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    monkeypatch.setattr(
        hub, "fetch", lambda source: datasets.load_dataset(str(folder), source.config, cache_dir=str(tmp_path / "c"))
    )
    with pytest.raises(DataError, match="has the configurations digits, full: name one, as owner/name:digits"):
        load_task(data="owner/name")
    with pytest.raises(DataError, match=r"digits, full \(did you mean 'digits'\?\): name one"):
        load_task(data="owner/name:digit")


# tasks of the benchmark from the hub


def test_the_parts_of_a_task_are_drawn(published: Write) -> None:
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(100)])
    columns = {"image": "img", "label": "fine_label"}
    published("train", [i % 100 for i in range(1500)], names, columns)
    published("test", [i % 100 for i in range(200)], names, columns)
    task = load_task("cifar100")
    sizes = {name: len(rows) for name, rows in task.splits.items()}
    assert sizes == {"train800": 800, "val200": 200, "train": 1000, "validation": 200, "test": 200}
    assert set(Counter(task.splits["train800"]["label"][:]).values()) == {8}
    assert not set(task.splits["train800"]["source"]) & set(task.splits["val200"]["source"])
    assert task.labels[3] == "class 3" and task.source.endswith("(own draw)")
    published("validation", [i % 100 for i in range(300)], names, columns)
    apart = load_task("cifar100")
    assert all("validation row" in source for source in apart.splits["val200"]["source"][:])
    published("train", [i % 100 for i in range(700)], names, columns)
    with pytest.raises(DataError, match="uoft-cs/cifar100: 800 images are needed, there are 700 in its training split"):
        load_task("cifar100")


def test_another_number_of_classes_is_told(published: Write) -> None:
    for split in ("train", "test"):
        published(split, [0, 1], None, {"image": "img", "label": "fine_label"})
    with pytest.raises(DataError, match="uoft-cs/cifar100 has 2 classes, task cifar100 has 100"):
        load_task("cifar100")
