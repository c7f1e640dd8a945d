"""Rows of language tasks from files, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pyra.errors import DataError
from pyra.scripts import tasks
from pyra.tasks.data.cards import load_card
from pyra.tasks.data.validation import validate
from pyra.tasks.language.data import examples_digest, load_text_task
from pyra.tasks.language.sources import read_file

ROWS = [{"text": 'a "fine" film', "label": 1}, {"text": "dull, cold", "label": 0}]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "more": [1]} for row in ROWS]), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"more": None, **row}) for row in ROWS))
    elif path.suffix == ".csv":
        path.write_text('id,text,label\r\n1,"a ""fine"" film",1\r\n2,"dull, cold",0\r\n')
    else:
        path.write_text('\ufefflabel\ttext\r\n1\ta "fine" film\r\n0\tdull, cold\r\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    records = read_file(write(tmp_path / f"a{suffix}"), ["text", "label"])
    assert [record.values for record in records] == [{"text": r["text"], "label": str(r["label"])} for r in ROWS]
    with pytest.raises(DataError, match=r"no column txt \(did you mean 'text'\?\)"):
        read_file(tmp_path / f"a{suffix}", ["txt", "label"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "good\t1\nbad\n", r"a\.tsv, line 2: 1 columns, expected 2"),
        ("a.tsv", "\n", "holds no rows"),
        ("a.tsv", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv", 'good,1\n"bad,0\n', "cannot be read: unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": ', r"line 2: not JSON"),
        ("a.jsonl", "[1]", r"line 1: expected an object with text, label, found a list"),
        ("a.jsonl", '{"text": ["a"], "label": 1}', "text is a list, expected text or a number"),
        ("a.jsonl", '{"text": null, "label": 1}', "text is a null"),
        ("a.jsonl", '{"text": "a"}', "no column label; it has text"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
    ],
)
def test_broken_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        read_file(tmp_path / name, ["text", "label"])
    assert "\n" not in str(error.value)


def test_examples_of_the_shipped_tasks(root: Path) -> None:
    reviews, sums = load_text_task("sst2", str(root)), load_text_task("gsm8k", str(root))
    first = reviews.splits["train"][0]
    assert first.texts == ("a fine film 0",) and (first.label, first.answer) == (1, "positive")
    assert first.prompt == "Review: a fine film 0\nSentiment:"
    first = sums.splits["test"][1]
    assert (first.reference, first.label) == ("102", -1) and first.answer.endswith("#### 102")
    assert len(reviews.split("test", 5)) == 5 and reviews.split("test", 5) == reviews.split("test", 5)
    assert reviews.shown(0) == "" and sums.shown(2).count("####") == 2 and sums.shown(2).endswith("\n\n")
    assert examples_digest(reviews.splits["train"]) != examples_digest(reviews.splits["train"][::-1])
    with pytest.raises(DataError, match=r"has no split 'tset' .did you mean 'test'"):
        reviews.split("tset")
    with pytest.raises(DataError, match="99 examples were asked for, the training split of gsm8k has 24"):
        sums.shown(99)


def test_labels_may_be_names_and_a_card_may_lie_beside_its_files(tmp_path: Path) -> None:
    values = yaml.safe_load((load_card("sst2")[1] / "sst2.yaml").read_text())
    files = {"train": "train.csv", "test": "test.csv"}
    card = {**values, "name": "mine", "folder": "", "files": files, "label_words": ["bad", "good"], "hub": ""}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({k: v for k, v in card.items() if k != "splits"}))
    for name in files.values():
        (tmp_path / name).write_text("text,label\na,positive\nb,negative\nc,1\nd,0.0\n")
    task = load_text_task(str(tmp_path / "mine.yaml"))
    assert [example.label for example in task.splits["test"]] == [1, 0, 1, 0]
    assert [example.answer for example in task.splits["test"]] == ["good", "bad", "good", "bad"]
    found = validate(str(tmp_path / "mine.yaml"))
    assert found.error is None
    assert found.notes == ["4 test examples are in the training split, too, such as 'a'"]


@pytest.fixture
def change(root: Path, tmp_path: Path) -> Callable[..., str]:
    """Write sst2 with one file changed, and return its root."""

    def changed(name: str, content: str | None) -> str:
        (tmp_path / "sst2").mkdir()
        for file in (root / "sst2").iterdir():
            text = content if file.name == name else file.read_text()
            if text is not None:
                (tmp_path / "sst2" / file.name).write_text(text)
        return str(tmp_path)

    return changed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.tsv", None, r"sst2 has no test.tsv: task sst2 is read from sst2/train.tsv, sst2/dev.tsv, sst2/test.tsv"),
        ("test.tsv", "good\t2\n", "label '2' is not one of negative, positive, nor a number below 2"),
        ("test.tsv", "good\t-1\n", "label '-1' is not one of"),
        ("test.tsv", "good\t\n", "label '' is not one of"),
        ("test.tsv", " \t1\ngood\t0", r"test\.tsv, line 1: text is empty \(split test of sst2\)"),
        ("test.tsv", "good\t1\nfine\t1", "test has no example of negative"),
        ("train.tsv", "a\t7\n" * 9, "and 6 more rows"),
    ],
)
def test_data_that_is_not_what_the_card_says(
    name: str, content: str | None, message: str, change: Callable[..., str]
) -> None:
    import re

    found = validate("sst2", change(name, content))
    assert found.error is not None and re.search(message, found.error) and "\n" not in found.error


def test_what_is_worth_knowing_is_noted(change: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = change("train.tsv", "good\t1\ngood\t0\nbad\t0\na fine film 2000\t1\n")
    found = validate("sst2", folder)
    assert found.error is None and found.images == {"train": 4, "validation": 8, "test": 16}
    text = "; ".join(found.notes)
    assert "train has 4 examples, its card says 6920" in text
    assert "1 test examples are in the training split, too, such as 'a fine film 2000'" in text
    assert "1 training examples repeat another, 1 with another answer" in text
    assert tasks.main(["validate", "sst2", "--root", folder]) == 0
    assert "examples" in capsys.readouterr().out
    assert tasks.main(["validate", "gsm8k", "--root", folder]) == 2
    assert tasks.main(["validate", "sst2", "--data", f"{folder}/sst2"]) == 0
    assert "train:4" in capsys.readouterr().out
    assert tasks.main(["validate", "sst2", "--data", f"{folder}/sst2/train.tsv"]) == 2
    assert "train.tsv is a file; give the folder with train.tsv" in capsys.readouterr().out


def test_the_hub_is_asked_without_a_root_and_says_which_files_would_do() -> None:
    with pytest.raises(DataError, match=r"openai/gsm8k:main cannot be fetched from the .*gsm8k/train.jsonl") as error:
        load_text_task("gsm8k")
    assert "\n" not in str(error.value)


@pytest.mark.network
@pytest.mark.parametrize("name", ["sst2", "gsm8k"])
def test_the_hub_has_what_the_cards_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert validate(name).notes == []


@pytest.mark.assets
@pytest.mark.parametrize("name", ["sst2", "gsm8k"])
def test_the_real_files(name: str, assets: Path) -> None:
    found = validate(name, str(assets))
    assert found.error is None
    assert not any("card says" in note for note in found.notes)


def test_lists_of_tasks_say_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.main(["ls", "--suite", "language"]) == 0
    printed: Any = capsys.readouterr().out
    assert "examples" in printed and "images" not in printed and "7473 + 1319" in printed
    tasks.main(["ls"])
    assert "caltech101" in (everything := capsys.readouterr().out) and "sst2" in everything
