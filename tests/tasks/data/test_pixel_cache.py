"""Decoded images on disk: the same pixels, never half a file, and never in the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from pyra.errors import ConfigError, DataError
from pyra.tasks.data import pixel_cache
from pyra.tasks.data.decoding import split_digest
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.data.pixel_cache import GIB, PixelCache, default_cache
from pyra.tasks.data.task import image_dataset, load_task

SIDE = 96  # 40 images make more than SMALLEST
MEAN_STD = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return load_task("demo").splits["validation"].select(range(40))


@pytest.fixture
def cache(tmp_path: Path) -> PixelCache:
    return PixelCache(tmp_path / "cache")


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for must be in the cache."""

    def fail(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(pixel_cache, "decoded", fail)
    monkeypatch.setattr("pyra.tasks.data.images.decoded", fail)


def make(rows: datasets.Dataset, cache: PixelCache | None, **changes: Any) -> ImageDataset:
    return ImageDataset(rows, **{"image_size": SIDE, **MEAN_STD, "cache": cache, **changes})


def files(cache: PixelCache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "pixels").iterdir())


def pixels(data: ImageDataset) -> torch.Tensor:
    assert data.pixels is not None
    return data.pixels


def test_pixels_and_items_are_those_without_a_cache(
    rows: datasets.Dataset, cache: PixelCache, request: pytest.FixtureRequest
) -> None:
    plain, written = make(rows, None), make(rows, cache)
    request.getfixturevalue("no_decoding")
    read = make(rows, cache)
    for data in (written, read):
        assert torch.equal(pixels(data), pixels(plain)) and data.labels == plain.labels and data.broken == []
        assert all(torch.equal(data[i]["pixel_values"], plain[i]["pixel_values"]) for i in range(40))
        assert data.image(3).tobytes() == plain.image(3).tobytes() and data.source(3) == plain.source(3)
    assert [Path(name).suffix for name in files(cache)] == [".json", ".u8"]


def test_whatever_changes_pixels_is_another_entry(rows: datasets.Dataset, cache: PixelCache) -> None:
    make(rows, cache)
    for changes in ({"image_size": SIDE + 1}, {"interpolation": "bilinear"}):
        assert torch.equal(pixels(make(rows, cache, **changes)), pixels(make(rows, None, **changes)))
    backwards = rows.select(range(39, -1, -1))
    assert torch.equal(pixels(make(backwards, cache)), pixels(make(rows, None)).flip(0))
    assert len(cache.entries()) == 4
    make(rows, cache, mean=(0.1,) * 3)  # normalising is not part of it
    assert len(cache.entries()) == 4


def test_small_splits_are_decoded(rows: datasets.Dataset, cache: PixelCache) -> None:
    make(rows, cache, image_size=16)
    assert not cache.folder.exists()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def no_record(file: Path) -> None:
    file.with_suffix(".json").unlink()


def half_a_record(file: Path) -> None:
    beside = file.with_suffix(".json")
    beside.write_text(beside.read_text()[:50])


def foreign_record(file: Path) -> None:
    file.with_suffix(".json").write_text(json.dumps({"key": 3}))


def fewer_rows(file: Path) -> None:
    beside = file.with_suffix(".json")
    record = json.loads(beside.read_text())
    beside.write_text(json.dumps({**record, "broken": {"0": "made up"}}))


@pytest.mark.parametrize("damage", [truncated, one_bit, no_record, half_a_record, foreign_record, fewer_rows])
def test_a_damaged_entry_is_written_anew(
    damage: Any, rows: datasets.Dataset, cache: PixelCache, request: pytest.FixtureRequest
) -> None:
    expected = pixels(make(rows, cache)).clone()
    damage(cache.entries()[0][0])
    assert torch.equal(pixels(make(rows, cache)), expected)
    request.getfixturevalue("no_decoding")
    assert torch.equal(pixels(make(rows, cache)), expected), "mended"


def test_broken_rows_are_part_of_the_record(
    rows: datasets.Dataset, cache: PixelCache, request: pytest.FixtureRequest
) -> None:
    def damage(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**row, "image": {"bytes": b"no", "path": None}} if index in (0, 7) else row

    features = rows.features
    damaged = datasets.Dataset.from_list([damage(row, i) for i, row in enumerate(rows)], features=features)
    plain = make(damaged, None, skip_broken=True)
    with pytest.raises(DataError, match=r"2 of 40 images cannot be read"):
        make(damaged, cache)
    request.getfixturevalue("no_decoding")
    read = make(damaged, cache, skip_broken=True)
    assert read.broken == plain.broken and len(read) == 38 and read.labels == plain.labels
    assert torch.equal(pixels(read), pixels(plain)) and read.image(0).tobytes() == plain.image(0).tobytes()
    with pytest.raises(DataError, match=r"2 of 40 images cannot be read: .*not an image"):
        make(damaged, cache)


def test_a_folder_that_cannot_be_written_is_told_once_and_reading_works(
    rows: datasets.Dataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "file").write_text("x")
    blocked = PixelCache(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file .*PYRA_CACHE.*--no-cache"):
        data = make(rows, blocked)
    assert torch.equal(pixels(data), pixels(make(rows, None)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        make(rows, blocked)
        make(rows.select(range(39)), blocked)
    assert len(told) == 1
    cache = PixelCache(tmp_path / "cache")
    make(rows, cache)
    folder = cache.folder / "pixels"
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    request.getfixturevalue("no_decoding")
    make(rows, cache)
    folder.chmod(0o755)


def test_no_space_leaves_nothing_half(
    rows: datasets.Dataset, cache: PixelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.warns(UserWarning, match="the disk is full"):
        make(rows, cache)
    monkeypatch.undo()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # the disk is full in the middle
    try:
        with pytest.warns(UserWarning, match="File too large"):
            data = make(rows, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(data) == 40 and files(cache) == []


def test_the_least_recently_used_entries_go(rows: datasets.Dataset, tmp_path: Path) -> None:
    one = 40 * 3 * SIDE**2
    cache = PixelCache(tmp_path, limit=int(2.5 * one))
    orders = [rows.select([*range(n, 40), *range(n)]) for n in range(3)]
    for n, order in enumerate(orders[:2]):
        make(order, cache)
        os.utime(cache.entries()[-1][0].with_suffix(".json"), (1000 + n, 1000 + n))
    first, second = (entry[0] for entry in cache.entries())
    mapped = pixels(make(orders[0], cache))  # now the first is the newest
    expected = mapped.clone()
    make(orders[2], cache)
    assert first.exists() and not second.exists() and len(files(cache)) == 4
    (tmp_path / "pixels" / "mine.txt").write_text("x")
    assert cache.clear() == 2 * one and files(cache) == ["mine.txt"]
    assert torch.equal(mapped, expected), "what is mapped stays readable"
    with pytest.warns(UserWarning, match="larger than PYRA_CACHE_LIMIT"):
        make(rows, PixelCache(tmp_path, limit=one - 1))


def test_what_killed_processes_left_is_swept(rows: datasets.Dataset, cache: PixelCache) -> None:
    folder = cache.folder / "pixels"
    folder.mkdir(parents=True)
    old, fresh = folder / ".a.u8.1.u8", folder / ".b.u8.2.u8"
    for file in (old, fresh):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    make(rows, cache)
    assert not old.exists() and fresh.exists()


def _open(folder: str, gate: Any, answers: Any) -> None:
    gate.wait()
    rows = load_task("demo").splits["validation"].select(range(40))
    data = make(rows, PixelCache(Path(folder)))
    answers.put(int(pixels(data).sum()))


def test_two_processes_at_once(rows: datasets.Dataset, cache: PixelCache) -> None:
    context = multiprocessing.get_context("fork")
    gate, answers = context.Event(), context.Queue()
    processes = [context.Process(target=_open, args=(str(cache.folder), gate, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    gate.set()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert found == {int(pixels(make(rows, None)).sum())} and len(files(cache)) == 2


@pytest.mark.parametrize(
    ("values", "folder"),
    [
        ({"PYRA_CACHE": "/x"}, "/x"),
        ({"PYRA_CACHE": "OFF"}, None),
        ({"PYRA_CACHE": "", "XDG_CACHE_HOME": "/y"}, "/y/pyra"),
        ({"PYRA_CACHE": "~/z"}, "/home/me/z"),
        ({"PYRA_CACHE": ""}, "/home/me/.cache/pyra"),
    ],
)
def test_where_it_lies(values: dict[str, str], folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in {"HOME": "/home/me", **values}.items():
        monkeypatch.setenv(name, value)
    found = default_cache()
    assert (None if found is None else str(found.folder)) == folder


def test_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRA_CACHE", "/x")
    monkeypatch.setenv("PYRA_CACHE_LIMIT", "0.5")
    assert default_cache() == PixelCache(Path("/x"), GIB // 2)
    for wrong in ("much", "-1", "nan", "1e30"):
        monkeypatch.setenv("PYRA_CACHE_LIMIT", wrong)
        with pytest.raises(ConfigError, match=f"PYRA_CACHE_LIMIT is '{wrong}'; give a number of GiB"):
            default_cache()


def test_a_task_uses_the_cache_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path / "cache"))
    task = load_task("demo")
    image_dataset(task, "validation", image_size=SIDE, **MEAN_STD, cache=False)
    assert not (tmp_path / "cache").exists()
    image_dataset(task, "validation", image_size=SIDE, **MEAN_STD)
    (file,) = (tmp_path / "cache" / "pixels").glob("*.json")
    record = json.loads(file.read_text())
    assert record["name"] == "demo/validation" and record["key"]["split"] == split_digest(task.splits["validation"])
