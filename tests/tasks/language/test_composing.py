"""Tasks whose prompts hold several rows: how they are drawn, and what is wrong with a card of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_language import decoder, save, tokenizer, write_sums

from pyra.errors import DataError
from pyra.scripts.main import main
from pyra.tasks.data.cards import load_card
from pyra.tasks.data.validation import validate
from pyra.tasks.language.cards import find_text_card
from pyra.tasks.language.composing import Composition, compose
from pyra.tasks.language.data import Example, examples_digest, load_text_task

ITEM = re.compile(r"Problem (\d+): (.+)")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small gsm8k that has enough rows in both splits."""
    return write_sums(tmp_path_factory.mktemp("data"), train=24, test=10)


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i}?", "answer": str(i)} for i in range(count)]


def parts(example: Example) -> tuple[dict[str, str], str]:
    """Read the items of a prompt, and the number that is asked for."""
    asked = re.search(r"(?:Repeat|Find) problem (\d+)", example.prompt)
    assert asked is not None
    return dict(ITEM.findall(example.prompt)), asked[1]


@pytest.mark.parametrize(("name", "count"), [("copy", 6), ("lookup", 8)])
def test_the_item_that_is_named_holds_the_answer(name: str, count: int, root: Path) -> None:
    task, plain = load_text_task(name, str(root)), load_text_task("gsm8k", str(root))
    rows_of = {split: [json.loads(line) for line in (root / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
               for split in ("train", "test")}  # fmt: skip
    asked = set()
    for split in ("train", "test"):
        own = {row["question"] for row in rows_of[split]}
        assert len(task.splits[split]) == len(own)
        for example, row, worked in zip(task.splits[split], rows_of[split], plain.splits[split], strict=True):
            items, number = parts(example)
            assert list(items) == [str(n) for n in range(1, count + 1)]
            assert set(items.values()) <= own and len(set(items.values())) == count
            assert items[number] == row["question"], "every row is asked for once, in order"
            assert example.answer == row["question" if name == "copy" else "answer"]
            assert example.reference == (row["question"] if name == "copy" else worked.reference)
            asked.add(number)
    assert len(asked) > count // 2, "at many places"


def test_a_draw_depends_on_split_and_position_alone() -> None:
    how = Composition(3, "{number}. {question}")
    first, again, other = (compose(how, rows(9), split) for split in ("train", "train", "test"))
    assert first == again != other
    assert {row["number"] for row in first} == {"1", "2", "3"}
    assert len({row["items"] for row in first}) == 9
    assert first[4]["items"].split("\n\n")[int(first[4]["number"]) - 1] == f"{first[4]['number']}. what is 4?"
    assert first[4]["answer"] == "4"
    assert all(len(set(re.findall(r"is (\d)", row["items"]))) == 3 for row in compose(how, rows(3), "train"))
    with pytest.raises(DataError, match="each prompt holds 3 rows, the test split has 2"):
        compose(how, rows(2), "test")


def test_values_with_braces_stay_as_they_are() -> None:
    odd = [{"question": "{number} {answer}"}, {"question": "b"}]
    (first, _) = compose(Composition(2, "{number}. {question}"), odd, "train")
    assert ". {number} {answer}" in first["items"]


# Whoever changes how prompts are drawn raises the version of the cards: scores before and after are of other tasks.
@pytest.mark.parametrize(("name", "digest"), [("copy", "2adc468d23fc2f36"), ("lookup", "2e12ce66de176a46")])
def test_the_examples_are_always_the_same(name: str, digest: str, root: Path) -> None:
    assert find_text_card(name)[0].version == "1"
    assert examples_digest(load_text_task(name, str(root)).splits["train"])[:16] == digest


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        ({"items": 1, "item": "{number} {question}"}, "compose: items is 1; it should be 2 at least"),
        ({"items": "6", "item": "{number} {question}"}, "compose: items = '6' should be of type int"),
        ({"items": 6}, "compose: key 'item' is missing"),
        ({"items": 6, "item": "{number} {question}", "kind": "x"}, "compose: unknown key 'kind'"),
        ({"items": 6, "item": "{question}"}, r"compose: item has no \{number\}"),
        ({"items": 6, "item": "{number} {qestion}"}, r"compose: item: \{qestion\} .*did you mean 'question'"),
        ({"items": 6, "item": "{number} {question.x}"}, r"\{question.x\} is not one of the columns"),
        (None, r"prompt: \{items\} is not one of the columns"),
        ("six", "compose = 'six' should be of type"),
    ],
)
def test_compositions_that_cannot_be(compose: Any, message: str, tmp_path: Path) -> None:
    values = yaml.safe_load((load_card("copy")[1] / "copy.yaml").read_text())
    values = {**values, "compose": compose} if compose else {k: v for k, v in values.items() if k != "compose"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=message) as error:
        find_text_card(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_prompts_and_columns_that_do_not_go_with_a_composition(tmp_path: Path) -> None:
    values = yaml.safe_load((load_card("copy")[1] / "copy.yaml").read_text())
    values |= {"prompt": "Which? {answer}", "columns": ["question", "answer", "items"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(DataError) as error:
        find_text_card(str(tmp_path / "mine.yaml"))
    for text in ("no {items} of compose in it", "no {number} of compose", "columns: items is what compose makes"):
        assert text in str(error.value)


def test_a_row_in_both_splits_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        lines = (root / "gsm8k" / "train.jsonl").read_text().splitlines()
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(lines[:8] if name == "test" else lines[7:]))
    found = validate("copy", str(tmp_path))
    assert found.error is None and "1 test examples are in the training split, too" in "; ".join(found.notes)


def test_copying_is_learnt_and_scored(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = save(decoder(spread=0.05, positions=512), tokenizer(), tmp_path / "backbone")
    data = ["--task", "copy", "--data", str(root / "gsm8k"), "--device", "cpu"]
    given = ["--backbone", str(backbone), "--method", "full", "--lr", "3e-3", "--batch-size", "8"]
    run = tmp_path / "run"
    learnt = [*data, *given, "--max-new-tokens", "8", "--output", str(run), "--epochs", "4"]
    assert main(["train", *learnt]) == 0
    told = capsys.readouterr().out
    assert "exact_match" in told and "answer NLL" in told and "left out" not in told and "cut" not in told
    assert main(["evaluate", "--backbone", str(backbone), *data, "--max-new-tokens", "8",
                 "--output", str(tmp_path / "bare")]) == 0  # fmt: skip
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "bare", run))
    assert after["answer_nll"] < before["answer_nll"] - 0.5 and after["num_test"] == 10
    assert after["settings"]["max_length"] == 512, "the card's, or what the backbone reads"


@pytest.mark.assets
@pytest.mark.parametrize("name", ["copy", "lookup"])
def test_the_real_texts(name: str, assets: Path) -> None:
    task = load_text_task(name, str(assets))
    seen = {split: {text for one in examples for text in parts(one)[0].values()}
            for split, examples in task.splits.items()}  # fmt: skip
    assert len(seen["train"]) > 7000 and len(seen["test"]) > 1300 and not seen["train"] & seen["test"]
    assert not validate(name, str(assets)).notes
