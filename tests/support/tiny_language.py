"""Tiny language models with random weights, tokenizers trained on a few sentences, and small tasks in files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import save_checkpoint

GOOD = ["a fine film", "great fun and warm", "a joy to watch", "it is warm and fine", "what a great joy"]
BAD = ["a dull film", "bad and cold", "a bore to watch", "it is cold and dull", "what a bad bore"]
SENTENCES = [
    *GOOD,
    *BAD,
    "Review: is this review positive or negative ? Answer: positive negative",
    "Question: Tom has 3 apples and buys 4 more . How many are there ? Answer: 3 + 4 = 7 #### 7 1 2 5 6 8 9 0",
]


def tokenizer(kind: str = "bpe", *, pad: bool = False, end: bool = True) -> PreTrainedTokenizerFast:
    """Train a tokenizer: ``bpe`` (bytes, a start token before every text) or ``words`` (BERT's marks around it)."""
    if kind == "bpe":
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        special = ["<s>", "</s>", "<pad>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        trained.train_from_iterator(SENTENCES, trainer)
        trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if end else {}) | ({"pad_token": "<pad>"} if pad else {})
        return PreTrainedTokenizerFast(tokenizer_object=trained, **names)
    trained = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trained.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def decoder(
    kind: str = "llama", seed: int = 0, vocab: int = 400, spread: float = 0.3, positions: int = 256
) -> nn.Module:
    """Make a decoder of two layers; its weights are drawn wide, so that logits differ, or narrow, so that it learns."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "initializer_range": spread,
    }
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if kind == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, **marks, tie_word_embeddings=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, **marks)).eval()


def encoder_model(seed: int = 0, vocab: int = 100) -> nn.Module:
    """Make a BERT of two layers with a head."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()


def mixture(folder: Path, *, kind: str = "joyai_llm_flash", words: bool = True, **changes: object) -> Path:
    """Write a JoyAI backbone folder: 4 layers, 8 experts of which a token is sent to 2, weights drawn wide."""
    torch.manual_seed(0)
    sizes = {"num_nextn_predict_layers": 0, "initializer_range": 0.2, "vocab_size": 400, **changes}
    save_checkpoint(joyai.JoyAIForCausalLM(joyai.tiny_config(**sizes)), folder, model_type=kind)
    if words:
        tokenizer().save_pretrained(folder)
    return folder


def save(model: nn.Module, words: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a backbone folder."""
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_reviews(root: Path, train: int = 40, test: int = 16) -> Path:
    """Write a small ``sst2`` below ``root``: words that are good or bad, in sentences that are each another."""
    folder = root / "sst2"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, start in (("train", train, 0), ("dev", 8, 1000), ("test", test, 2000)):
        lines = [f"{(GOOD, BAD)[i % 2][i // 2 % 5]} {start + i}\t{1 - i % 2}" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    return root


def write_sums(root: Path, train: int = 24, test: int = 6) -> Path:
    """Write a small ``gsm8k`` below ``root``."""
    folder = root / "gsm8k"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, start in (("train", train, 0), ("test", test, 100)):
        rows = [
            {
                "question": f"Tom has {start + i} apples and buys {i % 4} more . How many ?",
                "answer": f"{start + i} + {i % 4} = {start + i + i % 4}\n#### {start + i + i % 4}",
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root
