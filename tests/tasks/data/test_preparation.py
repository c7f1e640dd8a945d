"""Preparing tasks as local folders: whole or not at all, again and again, and never over somebody's files."""

from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pyra.errors import ConfigError, DataError, OutputError
from pyra.scripts import tasks
from pyra.tasks.data import preparation
from pyra.tasks.data.cards import TaskCard, load_card
from pyra.tasks.data.decoding import split_digest
from pyra.tasks.data.manifest import FILE, read_manifest
from pyra.tasks.data.preparation import prepare
from pyra.tasks.data.task import load_task
from pyra.tasks.data.validation import validate

CARD, HOME = load_card("kitti")  # four classes
SPLITS = ["test.parquet", "train800.parquet", "val200.parquet"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 classes x 260 images of training, 3 of test; a name is no ASCII."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 260), ("test", 3)):
        for label in range(4):
            home = folder / split / f"klasse ä{label}"
            home.mkdir(parents=True)
            for number in range(count):
                colour = (label * 60, number % 256, 1 if split == "test" else number // 256 * 9)
                Image.new("RGB", (4, 4), colour).save(home / f"bild ü{number}.png", compress_level=0)
    return folder


@pytest.fixture
def lists(tmp_path: Path, photos: Path) -> Path:
    """The same images in the layout of the benchmark."""
    folder = tmp_path / "lists" / "kitti"
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(photos)
    names = sorted(path.relative_to(photos) for path in (photos / "train").rglob("*.png"))
    chosen = {"train800": names[::2][:400] + names[1::2][:400], "val200": names[800:1000]}
    chosen["test"] = sorted(path.relative_to(photos) for path in (photos / "test").rglob("*.png"))
    for split, files in chosen.items():
        (folder / f"{split}.txt").write_text("".join(f"images/{file} {str(file.parent)[-1]}\n" for file in files))
    return tmp_path / "lists"


def made(output: Path, source: Path | str, card: TaskCard = CARD, **changes: Any) -> preparation.Prepared:
    return prepare(card, HOME, output, source=str(source), **changes)


def files(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "kitti").iterdir())


def test_a_folder_of_images_is_drawn_by_class(tmp_path: Path, photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = made(tmp_path, photos, advance=lambda now, total: seen.append((now, total)))
    assert done.images == {"train800": 800, "val200": 200, "test": 12} and done.draw == "own" and not done.there
    assert files(tmp_path) == sorted([FILE, *SPLITS]) and seen[-1] == (1012, 1012) and len(seen) > 5
    manifest = json.loads((tmp_path / "kitti" / FILE).read_text())
    assert (manifest["task"], manifest["version"], manifest["draw"]) == ("kitti", "1", "own")
    assert manifest["source"] == str(photos)
    task, own = load_task("kitti", root=str(tmp_path)), load_task(data=str(photos))
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 1000, "train800": 800, "val200": 200, "validation": 200, "test": 12,
    }  # fmt: skip
    assert Counter(task.splits["train800"]["label"][:]) == dict.fromkeys(range(4), 200)
    images = [{row["image"]["bytes"] for row in task.splits[name]} for name in ("train800", "val200")]
    assert len(images[0]) == 800 and len(images[1]) == 200 and not images[0] & images[1]
    assert task.labels == own.labels and task.labels[0] == "klasse ä0" and task.source.endswith("kitti (own draw)")
    assert split_digest(task.splits["test"]) == split_digest(own.splits["test"]) == manifest["splits"]["test"]["sha256"]
    checked = validate("kitti", str(tmp_path))
    assert checked.error is None and "which images are in train800 and val200 is our own draw" in checked.notes
    again = made(tmp_path / "again", photos)
    assert again.images == done.images
    assert read_manifest(tmp_path / "again" / "kitti") == read_manifest(tmp_path / "kitti"), "the same draw"


@pytest.mark.parametrize("how", ["source", "root"])
def test_lists_are_taken_as_they_are(how: str, tmp_path: Path, lists: Path) -> None:
    if how == "source":
        done = made(tmp_path / "out", lists / "kitti")
    else:
        done = prepare(CARD, HOME, tmp_path / "out", root=str(lists))
    assert done.draw == "source"
    listed, local = load_task("kitti", root=str(lists)), load_task("kitti", root=str(tmp_path / "out"))
    for name in listed.splits:
        assert split_digest(listed.splits[name]) == split_digest(local.splits[name])
    assert listed.labels == local.labels and local.source == str(tmp_path / "out" / "kitti")


def test_drawn_sprites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, home = load_card("dsprites_ori")
    monkeypatch.setattr("pyra.tasks.data.sources.load_card", None, raising=False)
    small = TaskCard(**{**card.__dict__, "splits": {"train800": 800, "val200": 200, "test": 100}})
    done = prepare(small, home, tmp_path)
    assert done.draw == "own" and done.images["test"] == 100
    from pyra.tasks.data.sources import load_splits

    drawn, read = load_splits(small, home, None), load_splits(small, home, tmp_path)
    assert read.where == str(tmp_path / "dsprites_ori") and drawn.where != read.where
    assert all(split_digest(drawn.splits[name]) == split_digest(read.splits[name]) for name in drawn.splits)
    assert drawn.splits["train"].features["label"].names == read.splits["train"].features["label"].names


def test_what_is_finished_stays(tmp_path: Path, photos: Path) -> None:
    made(tmp_path, photos)
    before = {name: (tmp_path / "kitti" / name).stat().st_mtime_ns for name in SPLITS}
    (tmp_path / "kitti" / "notes.txt").write_text("mine")
    (tmp_path / "kitti" / "val200.parquet").write_bytes(b"PAR1")  # damaged
    (tmp_path / "kitti" / "test.parquet").unlink()
    (tmp_path / "kitti" / ".test.parquet.abc.parquet").write_bytes(b"half")  # a process was killed
    done = made(tmp_path, photos)
    after = {name: (tmp_path / "kitti" / name).stat().st_mtime_ns for name in SPLITS}
    assert done.there == ["train800"] and [name for name in SPLITS if before[name] == after[name]] == [
        "train800.parquet"
    ]
    assert files(tmp_path) == sorted([FILE, "notes.txt", *SPLITS])
    assert validate("kitti", str(tmp_path)).error is None
    assert made(tmp_path, photos).there == ["train800", "val200", "test"]


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, photos: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))
    try:
        with pytest.raises(OutputError, match=r"kitti cannot be written \(.*the same command goes on"):
            made(tmp_path, photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == [FILE]
    with pytest.raises(
        DataError, match=r"neither train800.txt nor train800.parquet; preparing it was cut off: give the same"
    ):
        load_task("kitti", root=str(tmp_path))
    made(tmp_path, photos)
    assert validate("kitti", str(tmp_path)).error is None


def test_nothing_of_somebody_is_overwritten(tmp_path: Path, photos: Path, lists: Path) -> None:
    folder = tmp_path / "kitti"
    folder.mkdir()
    (folder / "train800.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"holds files that are not from pyra tasks prepare \(train800.parquet\)"):
        made(tmp_path, photos)
    assert (folder / "train800.parquet").read_bytes() == b"mine" and files(tmp_path) == ["train800.parquet"]
    with pytest.raises(OutputError, match="holds files that are not from"):  # in the place of the lists
        prepare(CARD, HOME, lists, root=str(lists))
    with pytest.raises(OutputError, match="lies inside --source"):  # it would be read as a class next time
        made(photos, photos)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "kitti").write_text("x")
    with pytest.raises(OutputError, match="kitti is a file"):
        made(tmp_path / "file", photos)
    made(tmp_path / "good", photos)
    manifest = json.loads((tmp_path / "good" / "kitti" / FILE).read_text())
    del manifest["splits"]["test"]
    (tmp_path / "good" / "kitti" / FILE).write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"not from pyra tasks prepare \(test.parquet\)"):
        made(tmp_path / "good", photos)


def test_another_source_version_or_task(tmp_path: Path, photos: Path, lists: Path) -> None:
    made(tmp_path, photos)
    with pytest.raises(OutputError, match=r"was prepared from .*photos.*, not from .*lists"):
        made(tmp_path, lists / "kitti")
    file = tmp_path / "kitti" / FILE
    manifest = json.loads(file.read_text())

    def say(**changes: Any) -> None:
        file.write_text(json.dumps({**manifest, **changes}))

    say(version="0")
    older = r"prepared as version 0 of kitti, here is version 1: remove the folder and prepare it again"
    with pytest.raises(DataError, match=older):
        load_task("kitti", root=str(tmp_path))
    with pytest.raises(DataError, match=older):
        made(tmp_path, photos)
    assert "prepared as version 0" in (validate("kitti", str(tmp_path)).error or "")
    say(task="dtd")
    with pytest.raises(DataError, match="was prepared as task dtd, it does not hold kitti"):
        load_task("kitti", root=str(tmp_path))
    say(format=2)
    with pytest.raises(DataError, match="has format 2, this release reads 1"):
        load_task("kitti", root=str(tmp_path))
    say(splits={"test": {"images": "many"}})
    with pytest.raises(DataError, match=r"no manifest of a prepared task: test: key 'sha256' is missing"):
        load_task("kitti", root=str(tmp_path))
    file.write_text("{")
    with pytest.raises(DataError, match=r"pyra_task.json cannot be read: .*; remove the folder"):
        load_task("kitti", root=str(tmp_path))
    say(splits={**manifest["splits"], "test": {"images": 12, "sha256": "0" * 64}})
    assert "test.parquet is not what was prepared" in (validate("kitti", str(tmp_path)).error or "")
    with pytest.raises(OutputError, match=r"the test split of .* has changed since"):
        made(tmp_path, photos)


def test_sources_that_do_not_fit(tmp_path: Path, photos: Path) -> None:
    dtd, home = load_card("dtd")
    with pytest.raises(DataError, match="has 4 classes, task dtd has 47"):
        prepare(dtd, home, tmp_path / "out", source=str(photos))
    with pytest.raises(DataError, match=r"/few: 1000 images are needed, there are 40 in its training split"):
        few = tmp_path / "few"
        for label in range(4):
            (few / "train" / str(label)).mkdir(parents=True)
            (few / "test").mkdir(exist_ok=True)
            (few / "test" / str(label)).symlink_to(photos / "test" / f"klasse ä{label}")
            for number in range(10):
                (few / "train" / str(label) / f"{number}.png").symlink_to(
                    photos / "train" / f"klasse ä{label}" / f"bild ü{number}.png"
                )
        made(tmp_path / "out", few)
    with pytest.raises(DataError, match="kitti does not bring its data"):
        prepare(CARD, HOME, tmp_path / "out")
    with pytest.raises(DataError, match="demo is a part of the package"):
        prepare(*load_card("demo"), tmp_path / "out")
    with pytest.raises(DataError, match="cannot be fetched from the Hugging Face hub"):
        prepare(*load_card("svhn"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_gone_is_named(tmp_path: Path, lists: Path, photos: Path) -> None:
    (lists / "kitti" / "gone.png").symlink_to(tmp_path / "nowhere")
    lines = (lists / "kitti" / "test.txt").read_text().splitlines()
    (lists / "kitti" / "test.txt").write_text("\n".join([*lines, "gone.png 0"]))
    with pytest.raises(DataError, match=r"gone.png cannot be read: repair or remove it"):
        made(tmp_path / "out", lists / "kitti")
    assert files(tmp_path / "out") == [FILE, "train800.parquet", "val200.parquet"]


# the command line


def test_the_command(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYRA_DATA", raising=False)
    argv = ["prepare", "kitti", "--source", str(photos), "--output", str(tmp_path)]
    assert tasks.main(argv) == 0
    said = capsys.readouterr().out
    assert "written" in said and "train800:800 val200:200 test:12" in said and "own" in said
    assert f"next: pyra tasks validate kitti --root {tmp_path}" in said
    assert tasks.main(argv) == 0 and "there before" in capsys.readouterr().out
    assert tasks.main(["validate", "kitti", "--root", str(tmp_path)]) == 0


def test_a_suite_goes_on_after_a_task_that_has_no_source(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYRA_DATA", raising=False)
    made(tmp_path / "a", photos)
    cards = [load_card(name)[0] for name in ("kitti", "svhn", "dtd")]
    monkeypatch.setattr("pyra.tasks.data.cards.suite_cards", lambda _: cards)
    assert tasks.main(["prepare", "vtab-1k", "--root", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().out
    assert "1 of 3 tasks are in" in said and (tmp_path / "b" / "kitti" / FILE).is_file()
    assert f"2 tasks have no data below {tmp_path / 'a'}: svhn, dtd; each needs FOLDER/TASK/" in said
    (tmp_path / "a" / "dtd").mkdir()
    assert tasks.main(["prepare", "vtab-1k", "--root", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().out
    assert f"dtd: {tmp_path / 'a' / 'dtd'} has neither train800.txt nor" in said and said.count("ERROR") == 1
    assert "svhn: ufldl-stanford/svhn:cropped_digits cannot be fetched" in said and "or --source, with images" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prepare"], "NAME and --output missing"),
        (["prepare", "kitti"], "--output missing"),
        (["prepare", "vtab-1k", "--source", "x", "--output", "y"], "--source goes with one task"),
        (["prepair"], "no verb 'prepair' .did you mean 'prepare'"),
    ],
)
def test_wrong_arguments(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tasks.main(argv)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in ("ls", "validate", "prepare", "cache")) and "example:" in said


def test_cache_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyra.tasks.data.task import image_dataset

    assert tasks.main(["cache"]) == 0 and "the cache is off" in capsys.readouterr().out
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path))
    image_dataset(load_task("demo"), "validation", image_size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert tasks.main(["cache"]) == 0
    said = capsys.readouterr().out
    assert "demo/validation" in said and "341" in said and f"GiB in {tmp_path}" in said
    (tmp_path / "pixels" / "0.u8").write_bytes(b"x")
    assert tasks.main(["cache"]) == 0 and "damaged" in capsys.readouterr().out
    assert tasks.main(["cache", "--clear"]) == 0 and "0.00 GiB removed" in capsys.readouterr().out
    assert list((tmp_path / "pixels").iterdir()) == []
