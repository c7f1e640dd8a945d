"""Tiny backbones in folders, and small tasks in files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_language import decoder, encoder_model, save, tokenizer, write_reviews, write_sums


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRA_DATA", raising=False)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Llama and a Qwen2 without padding token, and of a BERT."""
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "llama": save(decoder(spread=0.05), tokenizer(), folder / "llama"),
        "qwen": save(decoder("qwen", spread=0.05), tokenizer(), folder / "qwen"),
        "bert": save(encoder_model(), tokenizer("words"), folder / "bert"),
    }


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files of sst2 and gsm8k."""
    folder = tmp_path_factory.mktemp("data")
    write_reviews(folder)
    return write_sums(folder)
