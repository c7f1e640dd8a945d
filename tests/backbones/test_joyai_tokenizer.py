"""Tokenizers as DeepSeek-V3's is: its files ask for BOS in front of a text, and transformers does not heed that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from pyra.backbones import joyai
from pyra.backbones.joyai_tokenizer import check_tokenizer, load_tokenizer
from pyra.errors import ConfigError
from pyra.tasks.language.models import load_encoder

BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"
CHAT = "{{bos_token}}{% for m in messages %}<|User|>{{m['content']}}{% endfor %}<|Assistant|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORD = [4 + BYTES.index(letter) for letter in "Hi"]


def write(folder: Path, post: Any = None, **told: Any) -> Path:
    """Write the files of a tokenizer: bytes, four marks, nothing put in front of a text unless ``post`` says so."""
    words = (BOS, EOS, USER, ASSISTANT, *BYTES)
    made = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in words[:4]])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False) if post is None else post
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "chat_template": CHAT}
    about = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, **marks, **told}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(joyai.tiny_config().to_dict()))
    return folder


def rule(text: str) -> Any:
    return processors.TemplateProcessing(text, special_tokens=[(BOS, 0), (EOS, 1)])


@pytest.mark.parametrize("post", [None, rule(f"{BOS} $A")], ids=["DeepSeek's files", "a rule of its own"])
def test_bos_stands_before_a_text_once(post: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", post, add_bos_token=True)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Hi")["input_ids"] == [0, *WORD]
    check_tokenizer(tokenizer, joyai.tiny_config())
    assert tokenizer.decode([0, *WORD], skip_special_tokens=True) == "Hi"


@pytest.mark.parametrize("told", [{}, {"add_bos_token": False}])
def test_files_that_do_not_ask_for_bos_are_told_of(told: dict[str, bool], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", **told)
    assert load_tokenizer(folder)("Hi")["input_ids"] == WORD
    with pytest.raises(ConfigError, match="does not begin a text with BOS"):
        check_tokenizer(load_tokenizer(folder), joyai.tiny_config())
    check_tokenizer(load_tokenizer(folder, add_bos_token=True), joyai.tiny_config())


def test_what_the_caller_says_wins(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", add_bos_token=True)
    assert load_tokenizer(folder, add_bos_token=False)("Hi")["input_ids"] == WORD


def test_other_rules_of_a_tokenizer_stay(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", rule(f"$A {EOS}"), add_bos_token=True)
    assert load_tokenizer(folder)("Hi")["input_ids"] == [*WORD, 1]


def test_it_is_saved_with_bos(tmp_path: Path) -> None:
    load_tokenizer(write(tmp_path / "a", add_bos_token=True)).save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("Hi")["input_ids"] == [0, *WORD]


def test_prompts_and_answers_of_a_task_begin_with_one_bos(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "a", add_bos_token=True))
    plain, chat = load_encoder(folder), load_encoder(folder, chat=True)
    assert plain.prompt("Hi") == [0, *WORD]
    assert chat.prompt("Hi") == [0, 2, *WORD, 3]
    assert [each.ids[:3] for each in plain.answered("Hi", ["a", "b"])] == [[0, *WORD]] * 2
    assert [each.ids for each in chat.answered("Hi", ["Hi"])] == [[0, 2, *WORD, 3, *WORD]]
