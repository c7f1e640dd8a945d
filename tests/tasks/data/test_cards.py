"""Cards of tasks, lists of images, and ``pyra tasks``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pyra.errors import ConfigError, DataError
from pyra.scripts import tasks
from pyra.tasks.data.cards import card_files, load_card, suite_cards, suite_folders
from pyra.tasks.data.rows import read_image_list
from pyra.tasks.data.task import load_task
from pyra.tasks.data.validation import validate, validate_data

# Groups, classes: arXiv 1910.04867; the published table of the benchmark.
VTAB = {
    "natural": {
        "caltech101": 102,
        "cifar100": 100,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_pet": 37,
        "sun397": 397,
        "svhn": 10,
    },
    "specialized": {"diabetic_retinopathy": 5, "eurosat": 10, "patch_camelyon": 2, "resisc45": 45},
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "kitti": 4,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}


def test_the_nineteen_tasks() -> None:
    found: dict[str, dict[str, int]] = {}
    for card in suite_cards("vtab-1k"):
        found.setdefault(card.group, {})[card.name] = card.classes
        assert card.suite == "vtab-1k" and card.splits["train800"] == 800 and card.splits["val200"] == 200
        assert card.paper and card.license and card.description and card.metric == "accuracy" and card.higher_is_better
    assert found == VTAB
    assert suite_folders()["vtab-1k"].joinpath("README.md").is_file()


def test_every_card_is_called_as_its_file() -> None:
    for name in card_files():
        assert load_card(name)[0].name == name


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="did you mean 'caltech101'"):
        load_card("caltech")
    with pytest.raises(DataError, match="'vtab-1k' is a suite of 19 tasks"):
        load_task("vtab-1k")


def test_a_task_without_its_data_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRA_DATA", raising=False)
    with pytest.raises(DataError, match=r"task kitti does not bring its data: give --root FOLDER, which holds kitti/"):
        load_task("kitti")
    with pytest.raises(DataError, match=r"kitti is not there: --root must hold kitti/ with train800.txt"):
        load_task("kitti", root=str(tmp_path))


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """A folder with lists as the field keeps them; a picture a line."""
    folder = tmp_path / "kitti"
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "images" / "test").mkdir()
    for name, count, part in (("train800", 800, "train"), ("val200", 200, "train"), ("test", 711, "test")):
        lines = []
        for number in range(count):
            file = f"images/{part}/{name}-{number}.png"
            Image.new("L", (8, 8), number % 256).save(folder / file)
            lines.append(f"{file} {number % 4}")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_lists_of_images(kitti: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("kitti", root=str(kitti))
    sizes = {name: len(rows) for name, rows in task.splits.items()}
    assert sizes == {"train": 1000, "train800": 800, "val200": 200, "validation": 200, "test": 711}
    assert task.labels == ("0", "1", "2", "3") and task.splits["val200"]["label"][:5] == [0, 1, 2, 3, 0]
    assert task.splits["train"]["source"][800].endswith("kitti/images/train/val200-0.png")
    monkeypatch.setenv("PYRA_DATA", str(kitti))
    assert load_task("kitti").splits["test"].num_rows == 711
    checked = validate("kitti", str(kitti))
    assert checked.error is None and not checked.notes and checked.images["test"] == 711


def test_a_list_of_both_parts_is_the_training_split(kitti: Path) -> None:
    folder = kitti / "kitti"
    lines = [(folder / f"{name}.txt").read_text().splitlines() for name in ("val200", "train800")]
    (folder / "train800val200.txt").write_text("\n".join([*lines[0], *lines[1]]))
    assert load_task("kitti", root=str(kitti)).splits["train"]["source"][0].endswith("val200-0.png")


def rewritten(folder: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    file = folder / "kitti" / f"{name}.txt"
    file.write_text("\n".join(change(file.read_text().splitlines())))


WRONG: dict[str, tuple[str, Callable[[list[str]], list[str]], str]] = {
    "missing image": ("test", lambda x: [*x, "images/test/none.png 1"], "line 712: images/test/none.png is not there"),
    "label": (
        "val200",
        lambda x: ["images/train/val200-0.png 4", *x[1:]],
        "line 1: .* no path with a label from 0 to 3",
    ),
    "no label": ("val200", lambda x: ["images/train/val200-0.png", *x[1:]], "line 1: .* no path with a label"),
    "negative": ("val200", lambda x: ["images/train/val200-0.png -1", *x[1:]], "line 1: .* no path with a label"),
    "outside": ("val200", lambda x: ["../x.png 1", *x[1:]], r"line 1: \.\./x.png lies outside"),
    "absolute": ("val200", lambda x: ["/etc/passwd 1", *x[1:]], "line 1: /etc/passwd lies outside"),
    "empty": ("test", lambda x: [], "test.txt lists no image"),
    "too few": ("train800", lambda x: x[:799], "train800 has 799 images, its card says 800"),
    "empty class": ("all", lambda x: [i for i in x if not i.endswith(" 3")] * 2, "no split has an image of class 3"),
    "leak": ("test", lambda x: [*x[:-1], "images/train/train800-0.png 0"], "1 images are in the training and the test"),
    "broken": ("test", lambda x: x, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_folder_is_told(name: str, kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split, change, said = WRONG[name]
    for each in ("train800", "val200", "test") if split == "all" else (split,):
        rewritten(kitti, each, change)
    if name == "broken":
        (kitti / "kitti" / "images" / "test" / "test-7.png").write_bytes(b"not an image")
    found = validate("kitti", str(kitti))
    assert found.error is not None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found.error)
    assert tasks.main(["validate", "kitti", "--root", str(kitti)]) == 2
    assert "ERROR" in capsys.readouterr().out


def test_all_faults_are_told_at_once_and_none_with_advice_for_training(kitti: Path) -> None:
    rewritten(kitti, "train800", lambda lines: ["images/none.png 0", *lines[1:]])
    rewritten(kitti, "val200", lambda lines: ["images/train/val200-0.png 9", *lines[1:]])
    rewritten(kitti, "test", lambda lines: [])
    error = validate("kitti", str(kitti)).error or ""
    assert "train800.txt: line 1: images/none.png is not there; " in error
    assert "val200.txt: line 1: 'images/train/val200-0.png 9' is no path" in error and "test.txt lists no" in error
    assert "has an image of class" not in error  # what a wrong line names counts, too
    rewritten(kitti, "train800", lambda lines: [line for line in lines if not line.endswith(" 3")])
    rewritten(kitti, "val200", lambda lines: [line for line in lines if not line.endswith(" 3")])
    assert (validate("kitti", str(kitti)).error or "").endswith("; no list has an image of class 3")


def test_counts_and_broken_images_are_told_together(kitti: Path) -> None:
    rewritten(kitti, "train800", lambda lines: lines[:799])
    for name in ("train/train800-3", "train/val200-5", "test/test-7"):
        (kitti / "kitti" / "images" / f"{name}.png").write_bytes(b"not an image")
    error = validate("kitti", str(kitti)).error or ""
    assert "train800 has 799 images, its card says 800; train800: 1 of 799 images cannot be read: " in error
    assert error.count("not an image in a known format") == 3 and "--skip-broken" not in error
    assert validate("kitti", str(kitti), decode=False).error == "train800 has 799 images, its card says 800"


def test_wrong_columns_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "kitti").mkdir()
    for split in ("train800", "val200", "test"):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "kitti" / f"{split}.parquet")
    error = validate("kitti", str(tmp_path)).error or ""
    assert all(f"{split}.parquet has no image column" in error for split in ("train800", "val200", "test"))


def own(folder: Path, labels: dict[str, list[int]], image: bytes) -> str:
    """Write parquet files of three classes, and return the folder."""
    types = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    folder.mkdir()
    for split, values in labels.items():
        images = [{"bytes": image if number else b"no", "path": None} for number in range(len(values))]
        pq.write_table(
            pa.table({"image": images, "label": values}, schema=types.arrow_schema), folder / f"{split}.parquet"
        )
    return str(folder)


def test_your_own_data_is_checked(tmp_path: Path, kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = (kitti / "kitti" / "images" / "test" / "test-0.png").read_bytes()
    wrong = own(tmp_path / "wrong", {"train": [0, 1, 7], "test": [0, 1, 9]}, image)
    assert tasks.main(["validate", "--data", wrong]) == 2
    said = capsys.readouterr().out
    assert f"{wrong}/train.parquet row 2: label 7 is outside the 3 classes" in said and "row 2: label 9" in said

    empty = own(tmp_path / "empty", {"train": [0, 1, 0], "test": [0, 1]}, image)
    error = validate_data(empty).error or ""
    assert error.startswith(
        "no split has an image of class z; train: 1 of 3 images cannot be read: train.parquet row 0"
    )
    assert "; test: 1 of 2 images cannot be read" in error

    untrained = own(tmp_path / "untrained", {"train": [0, 1], "validation": [2, 0]}, image)
    found = validate_data(untrained, decode=False)
    assert found.problems == [] and found.images == {"train": 2, "validation": 2, "test": 2}
    untold, shared = found.notes[1:]
    assert untold == "1 classes of the test split have no training image (z)" and shared.startswith(
        "2 of 2 test images"
    )
    assert (validate_data(untrained).error or "").count("validation.parquet row 0") == 1  # it is the test split, too

    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for number in range(5):
            (images / name / f"{number}.png").write_bytes(image)
    assert tasks.main(["validate", "--data", str(images)]) == 0
    assert "train:8 test:2" in capsys.readouterr().out
    (images / "c").mkdir()
    assert "no readable images in the class folder c" in (validate_data(str(images)).error or "")


def test_what_a_suite_lacks_is_one_message(
    kitti: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [card for card in suite_cards("vtab-1k") if card.kind != "sprites"]  # drawing takes seconds
    monkeypatch.setattr("pyra.tasks.data.cards.suite_cards", lambda suite: drawn)
    rewritten(kitti, "train800", lambda lines: ["images/none.png 0", *lines[1:]])
    assert tasks.main(["validate", "vtab-1k", "--root", str(kitti)]) == 2
    said = capsys.readouterr().out.splitlines()
    assert next(line for line in said if line.startswith("kitti: ")).endswith("line 1: images/none.png is not there")
    missing = [line for line in said if line.startswith("16 tasks have no data below")]
    assert len(missing) == 1 and ": caltech101, cifar100, " in missing[0] and ", kitti, " not in missing[0]
    assert said[-1] == "0 of 17 tasks can be used"


def test_lists_and_help_answer_without_the_heavy_libraries() -> None:
    """They must take no longer than a second and a half."""
    for argv in (["tasks", "ls"], ["tasks", "--help"], ["tasks", "ls", "--help"], ["tasks", "prepare", "--help"]):
        code = (
            "import sys\nfrom pyra.scripts.main import main\n"
            f"try:\n    main({argv})\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'datasets', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", argv


def test_another_test_split_is_noted(kitti: Path) -> None:
    rewritten(kitti, "test", lambda lines: lines[:700])
    found = validate("kitti", str(kitti), decode=False)
    assert found.error is None and found.notes == ["test has 700 images, its card says 711"]


def test_test_classes_without_training_images_are_noted(kitti: Path) -> None:
    for split in ("train800", "val200"):
        rewritten(kitti, split, lambda lines: [f"{line[:-1]}{int(line[-1]) % 3}" for line in lines])
    assert validate("kitti", str(kitti), decode=False).notes == [
        "1 classes of the test split have no training image (3)"
    ]


def test_missing_lists(kitti: Path) -> None:
    (kitti / "kitti" / "test.txt").unlink()
    assert (validate("kitti", str(kitti)).error or "").endswith("kitti: test.txt is missing")
    (kitti / "kitti" / "train800.txt").unlink()
    assert "neither train800.txt nor train800.parquet" in (validate("kitti", str(kitti)).error or "")


def test_list_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list.txt cannot be read"):
        read_image_list(tmp_path / "list.txt", 3)


def test_ls_and_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.main(["ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for group in VTAB.values() for name in group) and "demo" in listed
    assert tasks.main(["ls", "--suite", "vtab-1k"]) == 0
    assert "demo" not in capsys.readouterr().out
    assert tasks.main(["validate", "demo"]) == 0
    assert "1 of 1 tasks can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["lss"], ConfigError, "no verb 'lss' .did you mean 'ls'"),
        (["ls", "--suite", "vtab"], ConfigError, "unknown suite 'vtab' .did you mean 'vtab-1k'"),
        (["validate", "nothing"], DataError, "unknown task 'nothing'"),
        (["validate", "kitti", "--data", "photos"], ConfigError, r"NAME \(kitti\) or --data \(photos\), not both"),
        (["validate", "kitti", "--label-column", "y"], ConfigError, "go with --data"),
    ],
)
def test_wrong_arguments(arguments: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tasks.main(arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "list"}, "kind 'list' is not one of parquet, lists, sprites"),
        ({"kind": "sprites"}, "kind sprites needs factor"),
        ({"files": {}}, "kind parquet needs files"),
        ({"splits": 3}, "splits = 3 should be of type"),
    ],
)
def test_cards_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], said: str
) -> None:
    values = yaml.safe_load(card_files()["demo"].read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.yaml").write_text(yaml.safe_dump({**values, **change}))
    monkeypatch.setattr("pyra.tasks.data.cards._root", lambda: tmp_path)
    with pytest.raises(DataError, match=said):
        load_card("mine")
