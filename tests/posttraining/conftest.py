"""Tiny decoders in folders, with and without a chat template, and small chats and preferences in files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_chats import TEMPLATE, chat, pair, write_lines
from tiny_language import decoder, mixture, save, tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokenizer has a chat template, and no padding token."""
    words = tokenizer()
    words.chat_template = TEMPLATE
    return save(decoder(spread=0.05), words, tmp_path_factory.mktemp("backbones") / "llama")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokenizer has no chat template."""
    return save(decoder(spread=0.05), tokenizer(), tmp_path_factory.mktemp("backbones") / "bare")


@pytest.fixture(scope="session")
def joyai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JoyAI mixture of four layers whose tokenizer has no chat template."""
    return mixture(tmp_path_factory.mktemp("backbones") / "joyai")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 chats to train on and 6 to test on."""
    folder = tmp_path_factory.mktemp("chats")
    write_lines(folder / "train.jsonl", map(chat, range(24)))
    write_lines(folder / "test.jsonl", map(chat, range(100, 106)))
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 preferences to train on and 6 to test on."""
    folder = tmp_path_factory.mktemp("pairs")
    write_lines(folder / "train.jsonl", map(pair, range(16)))
    write_lines(folder / "test.jsonl", map(pair, range(50, 56)))
    return folder
