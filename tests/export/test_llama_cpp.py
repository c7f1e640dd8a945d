"""GGUF files in llama.cpp itself: it opens them, and computes the model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import dense, mixture, opened
from torch import nn

llama_cpp: Any = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: it compiles llama.cpp, for a quarter of an hour"
)
pytest.importorskip("gguf", reason="the extra `engines` is not installed")

from pyra.export import export_language_model  # noqa: E402
from pyra.export.language_formats import GGUF_FILE  # noqa: E402

IDS = torch.randint(2, 400, (24,), generator=torch.Generator().manual_seed(1))


def by_llama_cpp(folder: Path) -> np.ndarray[Any, Any]:
    engine = llama_cpp.Llama(
        str(folder / GGUF_FILE), n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )
    engine.eval(IDS.tolist())
    found = np.array(engine.scores[: len(IDS)], dtype=np.float64)
    engine.close()
    return found


def by_transformers(model: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(IDS[None]).logits[0].double().numpy()
    return found


def apart(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Largest difference as a share of the largest logit."""
    assert np.abs(other).max() > 0.1 and one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_group": 2, "topk_group": 1}])
def test_a_mixture(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = mixture(tmp_path / "source", **changes)
    export_language_model(model, tmp_path / "out", "gguf-f32")
    assert apart(by_llama_cpp(tmp_path / "out"), by_transformers(model.model)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "biased"])
def test_a_dense_decoder(tmp_path: Path, kind: str) -> None:
    model = opened(dense(kind), tmp_path / "source")
    export_language_model(model, tmp_path / "out", "gguf-f32")
    assert apart(by_llama_cpp(tmp_path / "out"), by_transformers(model.model)) < 1e-4


def test_its_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    model = opened(dense("llama"), tmp_path / "source")
    export_language_model(model, tmp_path / "out", "gguf-f32")
    engine = llama_cpp.Llama(str(tmp_path / "out" / GGUF_FILE), n_ctx=64, verbose=False, vocab_only=True)
    for text in ("What is 12 + 7?", " two  spaces\nand a line", "naïve café"):
        assert (
            engine.tokenize(text.encode(), add_bos=False)
            == model.tokenizer(text, add_special_tokens=False)["input_ids"]
        )
