"""Tiny language models ready to be exported for engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from joyai_releases import write_published
from tiny_language import decoder, save, tokenizer
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import load_model
from pyra.export import LanguageModel
from pyra.export.engine_tokenizer import PROBES

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def published(folder: Path, **changes: Any) -> Path:
    """Write a JoyAI checkpoint with its MTP layer and a tokenizer with a chat template."""
    write_published(folder, joyai.tiny_config(**{"vocab_size": 400, "dtype": "bfloat16", **changes}))
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(folder)
    return folder


def mixture(folder: Path, **changes: Any) -> LanguageModel:
    """A JoyAI model of a published folder, whose MTP layer goes along."""
    source = published(folder, **changes)
    model = load_model(source, dtype=torch.float32).eval().requires_grad_(False)
    return subject(model, files=source, mtp=source, chat=True)


def dense(kind: str) -> nn.Module:
    """A decoder of the Llama type: by its model type, or ``biased``: a Llama with every bias and a tied head."""
    torch.manual_seed(0)
    if kind in ("llama", "qwen2"):
        return decoder("qwen" if kind == "qwen2" else kind)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def subject(model: nn.Module, *, chat: bool = False, **told: Any) -> LanguageModel:
    """A model with a tokenizer of its own."""
    words = tokenizer()
    words.chat_template = CHAT if chat else None
    rows = [words(text)["input_ids"] for text in PROBES]
    return LanguageModel(model.requires_grad_(False), words, rows, "tests", **told)


def opened(model: nn.Module, folder: Path) -> LanguageModel:
    """A model with the tokenizer that transformers opens beside it."""
    save(model, tokenizer(), folder)
    words = AutoTokenizer.from_pretrained(folder)
    rows = [words(text)["input_ids"] for text in PROBES]
    return LanguageModel(model.requires_grad_(False), words, rows, "tests", folder)
